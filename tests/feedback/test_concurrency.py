"""Many raters at once, and a process that is killed: exactly k answers, nobody twice, none lost."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy import func, select

from accord.feedback import AnsweredError, Campaigns, FeedbackStore, LeaseError
from accord.feedback.campaign_tables import places, tasks
from tests.feedback.conftest import make_candidate

RATERS = 50
IMAGES = 90
JUDGEMENTS = 3
KILLS = 50 if os.environ.get("ACCORD_SOAK") else 3


def _campaign(url: str, images: int = IMAGES, lease_s: float = 600) -> Campaigns:
    with FeedbackStore(url) as store:
        store.add_candidates(make_candidate(number) for number in range(images))
    campaigns = Campaigns(url)
    campaigns.create_alignment("c", "Title", judgements_per_item=JUDGEMENTS, lease_s=lease_s)
    return campaigns


def _check_exactly_k(campaigns: Campaigns, url: str, images: int = IMAGES) -> None:
    with FeedbackStore(url) as store:
        counted = store.judgements()
    assert Counter(row.image for row in counted) == {f"{n:064x}": JUDGEMENTS for n in range(images)}
    assert max(Counter((row.image, row.rater) for row in counted).values()) == 1
    assert campaigns.get("c").complete
    with campaigns._database.reading() as connection:  # the counters are true to the places
        held = func.count(places.c.id).filter(places.c.state == "answered")
        query = select(tasks.c.taken, tasks.c.answered, held).join(places).group_by(tasks.c.id)
        assert {tuple(row) for row in connection.execute(query)} == {(JUDGEMENTS,) * 3}


def test_fifty_raters(url: str) -> None:
    """Each from two devices, some with the next task fetched ahead, with undo and with repeated messages."""
    campaigns = _campaign(url)
    acknowledged: list[tuple[str, str]] = []
    barrier = threading.Barrier(RATERS)

    def rate(index: int) -> None:
        rater = f"rater-{index // 2}"  # two devices each
        draw = random.Random(index)
        barrier.wait()
        while (task := campaigns.lease("c", rater)) is not None:
            if draw.random() < 0.3:
                campaigns.lease("c", rater, besides=task.task_id)
            key = f"{index} {task.task_id} {draw.random()}"
            verdicts = draw.choices(["good", "bad", "skip"], k=len(task.images))
            try:
                for _ in range(draw.choice((1, 1, 2))):
                    campaigns.submit(task.task_id, rater, verdicts, idempotency_key=key)
            except AnsweredError:
                continue  # the other device was faster
            if draw.random() < 0.1:
                campaigns.undo("c", rater, idempotency_key=f"undo {key}")
            else:
                acknowledged.append((task.task_id, rater))

    with ThreadPoolExecutor(RATERS) as pool:
        list(pool.map(rate, range(RATERS)))
    with campaigns:
        _check_exactly_k(campaigns, url)
    assert len(acknowledged) >= IMAGES / 3 * JUDGEMENTS * 0.5


def test_leases_that_run_out_under_load(url: str) -> None:
    """Raters who walk away, and slow ones whose places others take: refused answers are refused aloud."""
    images = 30
    with _campaign(url, images, lease_s=0.05) as campaigns:

        def rate(index: int) -> None:
            draw = random.Random(index)
            for number in range(10_000):
                if campaigns.get("c").complete:
                    return
                task = campaigns.lease("c", f"rater-{index}")
                if task is None or draw.random() < 0.2:
                    continue
                if draw.random() < 0.2:
                    threading.Event().wait(0.06)
                try:
                    key = f"{index} {number}"
                    assert campaigns.submit(task.task_id, f"rater-{index}", ["good"] * 3, idempotency_key=key)
                except LeaseError:
                    continue  # told, and so nothing that the rater believes to be stored

        with ThreadPoolExecutor(10) as pool:
            list(pool.map(rate, range(10)))
        _check_exactly_k(campaigns, url, images)


SERVER = """
import sys, threading
from accord.feedback import Campaigns
url, life = sys.argv[1:]
campaigns = Campaigns(url)
says = threading.Lock()
def rate(rater):
    while (task := campaigns.lease("c", rater)) is not None:
        key = f"{life} {task.task_id} {rater}"
        campaigns.submit(task.task_id, rater, ["good"] * len(task.images), idempotency_key=key)
        with says:
            print(task.task_id, rater, flush=True)
threads = [threading.Thread(target=rate, args=(f"rater-{n}",)) for n in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_kill_9(url: str, root: Path) -> None:
    """Whatever was acknowledged before a kill is there, and the campaign ends with exactly k."""
    images = 12 * KILLS + 60
    with _campaign(url, images) as campaigns:
        acknowledged: set[tuple[str, ...]] = set()
        for life in range(KILLS):
            acknowledged |= _rate_and_kill(url, root, str(life), lines=3 + life % 5)
            with campaigns._database.reading() as connection:
                query = select(places.c.task, places.c.rater).where(places.c.state == "answered")
                stored = {(f"c.{task % 2**32}", rater) for task, rater in connection.execute(query)}
            assert acknowledged <= stored
        _rate_and_kill(url, root, "last", lines=None)
        _check_exactly_k(campaigns, url, images)


def _rate_and_kill(url: str, root: Path, life: str, lines: int | None) -> set[tuple[str, ...]]:
    """What a process acknowledged that is killed after so many answers (None: it may end)."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, url, life],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdout is not None
    with server:
        seen = [] if lines is None else [server.stdout.readline() for _ in range(lines)]
        if lines is not None:
            server.send_signal(signal.SIGKILL)
        rest = server.stdout.read()
    assert server.returncode == (0 if lines is None else -signal.SIGKILL)
    whole = "".join(seen) + rest.rpartition("\n")[0]
    return {tuple(line.split()) for line in whole.splitlines()}
