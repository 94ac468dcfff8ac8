"""How long the next task and an answer take in a large store, beside a naive query. Needs PostgreSQL.

    python -m benchmarks.feedback                      a million images, three million judgements
    python -m benchmarks.feedback --scale 0.01         a hundredth of it
    python -m benchmarks.feedback --keep DIRECTORY     keeps the filled database there, for the next time
    python -m benchmarks.feedback --url postgresql://… an empty database of your own

Without --url a PostgreSQL server of our own is started on a Unix socket, with durable commits (fsync, as by
default). SQL fills the store and leaves it as the campaigns' code would: three million judgements of a
million images, done; and a campaign of 200,000 images that begins. Then 20 raters at once lease and submit

- in process: through `Campaigns`, with nothing else between them and the database;
- over gRPC: in a feedback service, a process of its own. What is measured there is the service's own time in
  the store, from its metrics, and beside it what its clients see.

First each thinks for half a second in the mean (people take longer), then none does: 20 requests are always
under way, and the time is what this machine's processors can do.

The naive query beside it does what a rating page does at first: the image with the fewest judgements that
this rater has not judged, counted when it is asked for.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pwd
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from accord import tokens
from accord.client import FeedbackClient
from accord.feedback import Campaigns
from accord.feedback.database import Database
from benchmarks import processes

LOAD_BEFORE = round(os.getloadavg()[0], 2)
IMAGES = 1_000_000
NEW_IMAGES = 200_000
JUDGEMENTS = 3
RATERS = 20
THINK_S = 0.5

# One campaign, done: a third of a million tasks of three images, each answered by three of 300 raters.
FILL = """
INSERT INTO images SELECT md5(i::text) || md5('x' || i), 512, 512 FROM generate_series(0, :all - 1) i;
INSERT INTO candidates (image, prompt, category, split, source, seed)
  SELECT md5(i::text) || md5('x' || i), 'prompt ' || i / 3, (ARRAY['colour','count','background'])[i % 3 + 1],
         'seen', CASE WHEN i < :old THEN 'old' ELSE 'new' END, i FROM generate_series(0, :all - 1) i;
INSERT INTO campaigns VALUES
  (1, 'done', 'alignment', 'Done', :k, 600, 0, 'none', now(), :old / 3, 0, :old / 3 * :k);
INSERT INTO tasks
  SELECT (1::bigint << 32) + t, 1, 'prompt ' || t, 'colour', '', 0,
         jsonb_build_array(md5((3*t)::text) || md5('x' || 3*t), md5((3*t+1)::text) || md5('x' || 3*t+1),
                           md5((3*t+2)::text) || md5('x' || 3*t+2))::text,
         '[]', false, NULL, :k, :k, :k, false, 0 FROM generate_series(0, :old / 3 - 1) t;
INSERT INTO places (task, rater, state, slot, leased_ms, expires_ms)
  SELECT (1::bigint << 32) + t, 'old rater ' || (t * 7 + s * 100) % 300, 'answered', s, 0, 0
  FROM generate_series(0, :old / 3 - 1) t, generate_series(0, :k - 1) s;
INSERT INTO answers (idempotency_key, campaign, task, rater, kind, answer, seconds, created_at)
  SELECT 'key ' || p.id, 1, p.task, p.rater, 'answer', '["good","bad","good"]', 5, now() FROM places p;
INSERT INTO judgements (idempotency_key, image, prompt, rater, verdict, created_at, answer_id)
  SELECT 'done/key ' || a.id || '/' || n, md5((3*(a.task % 4294967296)+n)::text)
         || md5('x' || 3*(a.task % 4294967296)+n), 'prompt ' || a.task % 4294967296, a.rater,
         CASE WHEN n = 1 THEN 'bad' ELSE 'good' END, now(), a.id
  FROM answers a, generate_series(0, 2) n;
INSERT INTO campaign_raters
  SELECT 1, rater, max(task), count(*), 0, count(*), count(*) FROM places GROUP BY rater;
"""

NAIVE = """
SELECT c.image, c.prompt FROM candidates c
LEFT JOIN judgements j ON j.image = c.image AND j.prompt = c.prompt
WHERE NOT EXISTS (
  SELECT 1 FROM judgements m WHERE m.image = c.image AND m.prompt = c.prompt AND m.rater = :rater
)
GROUP BY c.image, c.prompt HAVING count(j.id) < :k ORDER BY count(j.id) DESC LIMIT 1
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images and judgements")
    parser.add_argument("--url", help="an empty PostgreSQL database; by default a server is started")
    parser.add_argument("--keep", type=Path, help="where the server's files stay, filled, for the next time")
    parser.add_argument("--seconds", type=float, default=30, help="how long the raters work, each time")
    parser.add_argument("--naive", type=int, default=5, help="how often the naive query is asked")
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(server(arguments.keep))
        result = measure(url, arguments.scale, arguments.seconds, arguments.naive)
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(url: str, scale: float, seconds: float, naive: int) -> dict[str, object]:
    database = Database(url)
    old, everything = sizes(scale)
    with Campaigns(url) as campaigns:
        name = begin(campaigns, database, scale)
        in_process = {}
        for kind, think_s in (("thinking", THINK_S), ("without_pause", 0.0)):
            door = InProcess(campaigns, name, f"{kind}-")
            in_process[kind] = rate(door, seconds, think_s)
        served = over_grpc(url, name, seconds)
        start_s = time.perf_counter()
        campaigns.get(name)
        get_s = time.perf_counter() - start_s
        start_s = time.perf_counter()
        campaigns.progress(name)
        progress_s = time.perf_counter() - start_s
    slow = [ask_naively(database, f"old rater {n}") for n in range(naive)]
    database.close()
    return {
        "images": everything,
        "judgements": old * JUDGEMENTS,
        "raters": RATERS,
        "in_process": in_process,
        "over_grpc": served,
        "how_far_ms": round(get_s * 1000, 1),
        "progress_ms": round(progress_s * 1000),
        "naive_next_task_ms": quantiles(slow) if slow else None,
        "cpus": os.cpu_count(),
        "load_before": LOAD_BEFORE,
    }


def sizes(scale: float) -> tuple[int, int]:
    """How many images are judged, and how many there are with those of the campaign that begins."""
    old = int(IMAGES * scale) // 3 * 3
    return old, old + max(300, int(NEW_IMAGES * scale) // 3 * 3)


def begin(campaigns: Campaigns, database: Database, scale: float) -> str:
    """The name of a campaign that nobody has begun, in a store that is filled if it was empty."""
    if not campaigns.campaigns():
        fill(database, *sizes(scale))
    name = f"new-{len(campaigns.campaigns())}"
    start_s = time.perf_counter()
    made = campaigns.create_alignment(name, "New", judgements_per_item=JUDGEMENTS, sources=["new"])
    say(f"made a campaign of {made.num_tasks} tasks in {time.perf_counter() - start_s:.1f} s")
    with database.writing() as connection:
        connection.exec_driver_sql("ANALYZE tasks")
    return name


def fill(database: Database, old: int, everything: int) -> None:
    statements = [statement for statement in FILL.split(";\n") if statement.strip()]
    for number, statement in enumerate(statements, start=1):
        start_s = time.perf_counter()
        with database.writing() as connection:
            # Rows that are right by construction: their foreign keys need no look-up each.
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
            values = {"old": old, "all": everything, "k": JUDGEMENTS}
            names = [name for name in values if f":{name}" in statement]
            query = text(statement.replace("::", "\\:\\:"))
            connection.execute(query, {name: values[name] for name in names})
        say(f"filled {number}/{len(statements)} in {time.perf_counter() - start_s:.1f} s")
    with database.writing() as connection:
        connection.exec_driver_sql("ANALYZE")


class Door(Protocol):
    """How a rater leases and submits."""

    def lease(self, rater: str) -> tuple[str, int] | None:
        """The task and how many images it has."""
        ...

    def submit(self, rater: str, task: str, images: int) -> None: ...


class InProcess:
    def __init__(self, campaigns: Campaigns, name: str, prefix: str) -> None:
        self._campaigns, self._name, self._prefix = campaigns, name, prefix

    def lease(self, rater: str) -> tuple[str, int] | None:
        task = self._campaigns.lease(self._name, self._prefix + rater)
        return None if task is None else (task.task_id, len(task.images))

    def submit(self, rater: str, task: str, images: int) -> None:
        key = hashlib.sha256(f"{self._prefix}{rater} {task}".encode()).hexdigest()
        self._campaigns.submit(task, self._prefix + rater, ["good"] * images, idempotency_key=key)


class OverGrpc:
    def __init__(self, client: FeedbackClient, name: str, prefix: str) -> None:
        self._client, self._name, self._prefix = client, name, prefix

    def lease(self, rater: str) -> tuple[str, int] | None:
        task = self._client.lease(self._name, rater=self._prefix + rater)
        return None if task is None else (task.task_id, len(task.images))

    def submit(self, rater: str, task: str, images: int) -> None:
        self._client.submit(task, ["good"] * images, rater=self._prefix + rater)


def rate(door: Door, seconds: float, think_s: float, servers: Sequence[int] = ()) -> dict[str, object]:
    """The times of each lease and of each submit, of raters that think that long in the mean.

    And the CPU time of the processes `servers` and their descendants for each answer, if they are given.
    """
    before_s = processes.cpu_s(servers)
    leases: list[float] = []
    submits: list[float] = []
    end_s = time.perf_counter() + seconds

    def work(number: int) -> None:
        rater, draw = f"rater-{number}", random.Random(number)
        time.sleep(draw.uniform(0, think_s))
        while time.perf_counter() < end_s:
            start_s = time.perf_counter()
            task = door.lease(rater)
            leases.append(time.perf_counter() - start_s)
            if task is None:
                return
            if think_s:
                time.sleep(draw.uniform(0, 2 * think_s))
            start_s = time.perf_counter()
            door.submit(rater, *task)
            submits.append(time.perf_counter() - start_s)

    with ThreadPoolExecutor(RATERS) as pool:
        for done in [pool.submit(work, number) for number in range(RATERS)]:
            done.result()
    found: dict[str, object] = {
        "answers_per_s": round(len(submits) / seconds, 1),
        "next_task_ms": quantiles(leases),
        "submit_ms": quantiles(submits),
    }
    if servers:
        used_s = processes.cpu_s(servers) - before_s
        found["server_cpu_ms_per_answer"] = round(used_s / len(submits) * 1000, 1) if submits else None
    return found


def over_grpc(url: str, name: str, seconds: float) -> dict[str, object]:
    """The same over a feedback service: its own times by its metrics, and those that its clients see."""
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        token = tokens.add(directory / "tokens.yaml", "bench", ["rate"])
        settings = {
            "url": url, "images": f"{directory}/images", "state_dir": f"{directory}/state",
            "tokens": f"{directory}/tokens.yaml", "port": 0, "grpc_port": 0, "metrics_port": 0,
        }  # fmt: skip
        (directory / "config.yaml").write_text(json.dumps(settings))
        endpoint = directory / "endpoint.json"
        command = [sys.executable, "-m", "services.feedback", "serve", "--config", f"{directory}/config.yaml"]
        with subprocess.Popen(
            [*command, "--endpoint-file", str(endpoint)], stdout=subprocess.DEVNULL
        ) as served:
            try:
                while not endpoint.exists():
                    assert served.poll() is None, "the service ended"
                    time.sleep(0.1)
                addresses = json.loads(endpoint.read_text())
                for kind, think_s in (("thinking", THINK_S), ("without_pause", 0.0)):
                    before = server_seconds(addresses["metrics"])
                    with FeedbackClient(addresses["gRPC"], token=token) as client:
                        door = OverGrpc(client, name, f"{kind}-")
                        seen = rate(door, seconds, think_s, [served.pid, *processes.postmaster(url)])
                    after = server_seconds(addresses["metrics"])
                    own = {key: within(after, before, key) for key in ("lease", "submit")}
                    found[kind] = {"in_the_server": own, "clients_see": seen}
            finally:
                served.terminate()
    return found


def server_seconds(metrics: str) -> dict[tuple[str, float], float]:
    """By operation and upper bound in seconds: how many operations took at most that long."""
    with urllib.request.urlopen(metrics) as reply:
        page = reply.read().decode()
    return {
        (sample.labels["operation"], float(sample.labels["le"])): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "accord_feedback_operation_seconds_bucket"
    }


def within(
    after: dict[tuple[str, float], float], before: dict[tuple[str, float], float], operation: str
) -> dict[str, float]:
    """The share of operations within some bounds, and between which bounds their 95th percentile is."""
    counts = {
        bound: number - before.get((name, bound), 0.0)
        for (name, bound), number in sorted(after.items())
        if name == operation
    }
    total = counts[float("inf")]
    p95 = next(bound for bound, number in counts.items() if number >= 0.95 * total)
    shares = {f"within_{bound * 1000:g}_ms": round(counts[bound] / total, 4) for bound in (0.025, 0.05, 0.1)}
    return {"operations": total, "p95_at_most_ms": p95 * 1000, **shares}


def ask_naively(database: Database, rater: str) -> float:
    with database.reading() as connection:
        start_s = time.perf_counter()
        connection.execute(text(NAIVE), {"rater": rater, "k": JUDGEMENTS}).first()
        return time.perf_counter() - start_s


def quantiles(values_s: list[float]) -> dict[str, float]:
    ordered = sorted(values_s)
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    found = {name: ordered[min(len(ordered) - 1, int(len(ordered) * share))] for name, share in at.items()}
    found |= {"mean": statistics.fmean(ordered), "max": ordered[-1]}
    return {name: round(value * 1000, 1) for name, value in found.items()}


def say(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def server(keep: Path | None = None) -> Iterator[str]:
    """A PostgreSQL server on a Unix socket, with PostgreSQL's default settings. It stays filled in `keep`."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parts[-2]))
    initdb = shutil.which("initdb")
    binaries = Path(initdb).resolve().parent if initdb else found[-1]
    directory = keep.resolve() if keep else Path(tempfile.mkdtemp(prefix="accord-bench-"))
    directory.mkdir(parents=True, exist_ok=True)
    user = pwd.getpwnam("postgres").pw_name if os.geteuid() == 0 else None

    def run(*command: str) -> None:
        subprocess.run(command, cwd=directory, user=user, check=True, stdout=subprocess.DEVNULL)

    try:
        if user:
            shutil.chown(directory, user)
        data = f"--pgdata={directory}/data"
        if not (directory / "data").exists():
            login = ("--username=accord", "--auth=trust", "--encoding=UTF8", "--locale=C")
            run(f"{binaries}/initdb", data, *login)
        options = f"--options=-k {directory} -c listen_addresses=''"
        run(f"{binaries}/pg_ctl", "start", "--wait", data, options, f"--log={directory}/log")
        try:
            yield f"postgresql://accord@/postgres?host={directory}"
        finally:
            run(f"{binaries}/pg_ctl", "stop", "--wait", data, "--mode=fast")
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
