"""How long the next task and an answer take in a large store, beside a naive query. Needs PostgreSQL.

    python -m benchmarks.feedback                      a million images, three million judgements
    python -m benchmarks.feedback --scale 0.01         a hundredth of it
    python -m benchmarks.feedback --url postgresql://… an empty database of your own

Without --url a PostgreSQL server of our own is started on a Unix socket, with durable commits (fsync, as by
default), and removed at the end. SQL fills the store and leaves it as the campaigns' code would: three
million judgements of a million images, done; and a campaign of 200,000 images that begins. Then 20 raters at
once lease and submit through `Campaigns`, with nothing else between them and the database; what is measured
is the time in these calls. First each thinks for half a second in the mean (people take longer), then none
does: 20 requests are always under way, and the time is what this machine's processors can do.

The naive query beside it does what a rating page does at first: the image with the fewest judgements that
this rater has not judged, counted when it is asked for.
"""

import argparse
import contextlib
import json
import os
import pwd
import random
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import text

from accord.feedback import Campaigns
from accord.feedback.database import Database

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
INSERT INTO campaigns VALUES (1, 'done', 'alignment', 'Done', :k, 600, 0, 'none', now());
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
    parser.add_argument("--seconds", type=float, default=30, help="how long the raters work")
    parser.add_argument("--naive", type=int, default=5, help="how often the naive query is asked")
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(server())
        result = measure(url, arguments.scale, arguments.seconds, arguments.naive)
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(url: str, scale: float, seconds: float, naive: int) -> dict[str, object]:
    database = Database(url)
    old = int(IMAGES * scale) // 3 * 3
    everything = old + max(300, int(NEW_IMAGES * scale) // 3 * 3)
    fill(database, old, everything)
    with Campaigns(url) as campaigns:
        start_s = time.perf_counter()
        made = campaigns.create_alignment("new", "New", judgements_per_item=JUDGEMENTS, sources=["new"])
        say(f"made a campaign of {made.num_tasks} tasks in {time.perf_counter() - start_s:.1f} s")
        thinking = rate(campaigns, seconds, THINK_S)
        busy = rate(campaigns, seconds, 0)
        start_s = time.perf_counter()
        campaigns.progress("new")
        progress_s = time.perf_counter() - start_s
    slow = [ask_naively(database, f"old rater {n}") for n in range(naive)]
    database.close()
    return {
        "images": everything,
        "judgements": old * JUDGEMENTS,
        "raters": RATERS,
        "thinking": thinking,
        "without_pause": busy,
        "progress_ms": round(progress_s * 1000),
        "naive_next_task_ms": quantiles(slow) if slow else None,
        "cpus": os.cpu_count(),
    }


def fill(database: Database, old: int, everything: int) -> None:
    for number, statement in enumerate(FILL.split(";\n"), start=1):
        if statement.strip():
            start_s = time.perf_counter()
            with database.writing() as connection:
                values = {"old": old, "all": everything, "k": JUDGEMENTS}
                names = [name for name in values if f":{name}" in statement]
                query = text(statement.replace("::", "\\:\\:"))
                connection.execute(query, {name: values[name] for name in names})
            say(f"filled {number}/7 in {time.perf_counter() - start_s:.1f} s")
    with database.writing() as connection:
        connection.exec_driver_sql("ANALYZE")


def rate(campaigns: Campaigns, seconds: float, think_s: float) -> dict[str, object]:
    """The times of each lease and of each submit, of raters that think that long in the mean."""
    leases: list[float] = []
    submits: list[float] = []
    end_s = time.perf_counter() + seconds

    def work(number: int) -> None:
        rater, draw = f"rater {number}", random.Random(number)
        while time.perf_counter() < end_s:
            start_s = time.perf_counter()
            task = campaigns.lease("new", rater)
            leases.append(time.perf_counter() - start_s)
            if task is None:
                return
            if think_s:
                time.sleep(draw.uniform(0, 2 * think_s))
            start_s = time.perf_counter()
            key = f"{rater} {task.task_id}"
            campaigns.submit(task.task_id, rater, ["good"] * len(task.images), idempotency_key=key)
            submits.append(time.perf_counter() - start_s)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(RATERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "answers_per_s": round(len(submits) / seconds, 1),
        "next_task_ms": quantiles(leases),
        "submit_ms": quantiles(submits),
    }


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
def server() -> Iterator[str]:
    """A PostgreSQL server on a Unix socket, with PostgreSQL's default settings."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parts[-2]))
    initdb = shutil.which("initdb")
    binaries = Path(initdb).resolve().parent if initdb else found[-1]
    directory = Path(tempfile.mkdtemp(prefix="accord-bench-"))
    user = pwd.getpwnam("postgres").pw_name if os.geteuid() == 0 else None

    def run(*command: str) -> None:
        subprocess.run(command, cwd=directory, user=user, check=True, stdout=subprocess.DEVNULL)

    try:
        if user:
            shutil.chown(directory, user)
        data = f"--pgdata={directory}/data"
        run(f"{binaries}/initdb", data, "--username=accord", "--auth=trust", "--encoding=UTF8", "--locale=C")
        options = f"--options=-k {directory} -c listen_addresses=''"
        run(f"{binaries}/pg_ctl", "start", "--wait", data, options, f"--log={directory}/log")
        try:
            yield f"postgresql://accord@/postgres?host={directory}"
        finally:
            run(f"{binaries}/pg_ctl", "stop", "--wait", data, "--mode=fast")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
