"""The next task and an answer beside Label Studio's, in stores of the same size. Needs PostgreSQL.

    python3 -m venv DIRECTORY && DIRECTORY/bin/pip install 'label-studio[uwsgi]==1.23.2'
    python -m benchmarks.feedback_label_studio --label-studio DIRECTORY               a million images
    python -m benchmarks.feedback_label_studio --label-studio DIRECTORY --scale 0.01  a hundredth of it

Label Studio needs an environment of its own; no part of it is imported here. --keep and --ours name
directories in which the filled stores stay for the next time (--ours: that of `benchmarks.feedback --keep`).

One after the other gets a PostgreSQL server with default settings on a Unix socket, and the same work: a
million images are judged, three times each, and a campaign (in Label Studio: a project) of 200,000 images
begins, one image a task and three answers wanted of each. 20 raters at once ask for a task and answer it,
first with half a second of thought in the mean, then without pause.

Label Studio runs as its own container runs it: uwsgi with two processes a core, one thread each; Sentry,
analytics and the check for updates are off. Its clients ask by HTTP with users' tokens, ours by gRPC. Its own
times are uwsgi's, from when a process takes the request up (waiting for a process is not in them), ours are
the store's; CPU time is that of the server and of PostgreSQL. What favours Label Studio: its store has no
rows of states, which its interface writes for each task and answer, and the judged images are in another
project, so that no search for a task meets them.
"""

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import text

from accord.feedback import Campaigns
from accord.feedback.database import Database
from benchmarks import feedback, processes
from benchmarks.label_studio import LabelStudio

GIVEN_HERE = """
SELECT answers.task, answers.rater FROM answers JOIN campaigns ON campaigns.number = answers.campaign
WHERE campaigns.campaign_id = :campaign AND answers.kind = 'answer'
"""

KINDS = {"thinking": feedback.THINK_S, "without_pause": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--label-studio", type=Path, required=True, help="the environment that it is in")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images and judgements")
    parser.add_argument("--seconds", type=float, default=30, help="how long the raters work, each time")
    parser.add_argument("--sampling", choices=["Sequential", "Uniform"], default="Sequential")
    parser.add_argument("--keep", type=Path, help="where Label Studio's filled store stays")
    parser.add_argument("--ours", type=Path, help="where our filled store stays, or is already")
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    arguments = parser.parse_args()
    scale = arguments.scale
    result: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "scale": scale,
        "sampling": arguments.sampling,
    }
    with feedback.server(arguments.ours) as url:
        result["accord"] = {"load_before": os.getloadavg()[0], **ours(url, scale, arguments.seconds)}
    with feedback.server(arguments.keep) as url:
        rival = LabelStudio(arguments.label_studio, url, arguments.sampling)
        rival.set_up(scale, [f"{kind}-rater-{number}" for kind in KINDS for number in range(feedback.RATERS)])
        servers = processes.postmaster(url)
        result["label_studio"] = {
            "load_before": os.getloadavg()[0],
            **theirs(rival, servers, arguments.seconds),
        }
    print("\n".join(table(result)))
    print(f"{result['label_studio']['failed']} requests failed in Label Studio")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def ours(url: str, scale: float, seconds: float) -> dict[str, Any]:
    database = Database(url)
    with Campaigns(url) as campaigns:
        name = feedback.begin(campaigns, database, scale)
    found = feedback.over_grpc(url, name, seconds)
    with database.reading() as connection:
        given = [(row[0], row[1]) for row in connection.execute(text(GIVEN_HERE), {"campaign": name})]
    database.close()
    return {"times": found, "collected": collected(given, feedback.JUDGEMENTS)}


def theirs(rival: LabelStudio, servers: list[int], seconds: float) -> dict[str, Any]:
    times: dict[str, Any] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as scratch, rival.served(Path(scratch)) as (address, log, process):
        for kind, think_s in KINDS.items():
            before = len(log.read_text())
            # uwsgi closes a connection after its answer: that is its default.
            limits = httpx.Limits(max_keepalive_connections=0)
            with httpx.Client(base_url=address, timeout=600, limits=limits) as client:
                door = rival.door(client, f"{kind}-")
                seen = feedback.rate(door, seconds, think_s, [process, *servers])
            failed += door.failed
            own = within(log.read_text()[before:].splitlines())
            times[kind] = {"in_the_server": own, "clients_see": seen}
    return {"times": times, "collected": collected(rival.given(), feedback.JUDGEMENTS), "failed": failed}


def within(lines: Iterable[str]) -> dict[str, Any]:
    """Quantiles of the server's own times, in milliseconds, from the lines that `LOG` made."""
    times: dict[str, list[float]] = {"lease": [], "submit": []}
    for line in lines:
        match line.split():
            case ["request", "GET", "200", micros, uri] if uri.endswith("/next"):
                times["lease"].append(int(micros) / 1e6)
            case ["request", "POST", "201", micros, uri] if uri.endswith("/annotations/"):
                times["submit"].append(int(micros) / 1e6)
    return {name: feedback.quantiles(values) if values else None for name, values in times.items()}


def collected(given: Iterable[tuple[object, object]], wanted: int) -> dict[str, int]:
    """What was gathered, by task and rater of each answer: how many tasks are full, and how many too full."""
    pairs = Counter(given)
    per_task: Counter[object] = Counter()
    for (task, _), number in pairs.items():
        per_task[task] += number
    return {
        "answers": per_task.total(),
        "full": sum(number == wanted for number in per_task.values()),
        "too_many": sum(number > wanted for number in per_task.values()),
        "twice_by_one_rater": sum(number > 1 for number in pairs.values()),
    }


def table(result: dict[str, Any]) -> list[str]:
    """Markdown: what clients see, in milliseconds; the CPU time is the server's and PostgreSQL's."""
    heading = [
        "",
        "next task p50, p95",
        "answer p50, p95",
        "answers a second",
        "CPU ms an answer",
        "full",
        "too many",
    ]
    rows = [heading, ["---"] * len(heading)]
    for name in ("accord", "label_studio"):
        for kind, found in result[name]["times"].items():
            seen, gathered = found["clients_see"], result[name]["collected"]
            times = [f"{seen[key]['p50']}, {seen[key]['p95']}" for key in ("next_task_ms", "submit_ms")]
            counts = [seen["answers_per_s"], seen["server_cpu_ms_per_answer"], gathered["full"]]
            cells = [*times, *counts, gathered["too_many"]]
            rows.append([f"{name}, {kind.replace('_', ' ')}", *(str(cell) for cell in cells)])
    return ["| " + " | ".join(row) + " |" for row in rows]


if __name__ == "__main__":
    main()
