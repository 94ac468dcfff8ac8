"""An acknowledged judgement is there, whatever happens to the process that stored it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from accord.feedback import Candidate, FeedbackStore

IMAGES = 50
KILLS = 5

WRITER = """
import sys
from accord.feedback import FeedbackStore, Judgement
url, life = sys.argv[1:]
store = FeedbackStore(url)
for number in range(100_000):
    # One, two or three judgements a transaction; of each transaction all are stored, or none.
    keys = [f"{life}-{number}-{part}" for part in range(number % 3 + 1)]
    store.submit(Judgement(key, f"{number % 50:064x}", "red star", life, "good") for key in keys)
    print(*keys, flush=True)
"""


def test_acknowledged_judgements_survive_kill_9(url: str, root: Path) -> None:
    with FeedbackStore(url) as store:
        store.add_candidates(
            Candidate(f"{number:064x}", "red star", "colour", "seen", number, 64, 64)
            for number in range(IMAGES)
        )
    acknowledged: list[str] = []
    for life in range(KILLS):
        acknowledged += _write_and_kill(url, root, str(life), lines=7 * life + 3)
        with FeedbackStore(url) as store:
            stored = [judgement.idempotency_key for judgement in store.judgements()]
        assert len(stored) == len(set(stored))
        assert set(acknowledged) <= set(stored)
        transactions = {key.rpartition("-")[0] for key in stored}
        whole = {f"{name}-{part}" for name in transactions for part in range(int(name.split("-")[1]) % 3 + 1)}
        assert set(stored) == whole
        # At most the transaction that was under way when the kill came was stored and not acknowledged.
        assert len({key.rpartition("-")[0] for key in set(stored) - set(acknowledged)}) <= life + 1


def _write_and_kill(url: str, root: Path, life: str, lines: int) -> list[str]:
    """Let a process store judgements, and kill it after `lines` acknowledgements. Returns all such keys."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, url, life], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert writer.stdout is not None
    with writer:
        seen = [writer.stdout.readline() for _ in range(lines)]
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read()  # what was acknowledged before the kill arrived
    assert writer.returncode == -signal.SIGKILL
    complete = "".join(seen) + rest.rpartition("\n")[0]
    return complete.split()
