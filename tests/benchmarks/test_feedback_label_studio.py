"""What the comparison with Label Studio counts; the comparison itself is run by hand."""

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import processes
from benchmarks.feedback_label_studio import collected, table, within


def test_tasks_that_are_too_full_are_counted_and_who_answered_twice() -> None:
    given = [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("b", 3), ("b", 4), ("c", 1), ("c", 1)]
    assert collected(given, wanted=3) == {"answers": 9, "full": 1, "too_many": 1, "twice_by_one_rater": 1}
    assert collected([], wanted=3) == {"answers": 0, "full": 0, "too_many": 0, "twice_by_one_rater": 0}


def test_the_servers_own_times_are_those_of_answered_requests() -> None:
    lines = [f"request GET 200 {1000 * n} /api/projects/7/next" for n in range(1, 101)]
    lines += [
        "request POST 201 50000 /api/tasks/3/annotations/",
        "request POST 500 1 /api/tasks/3/annotations/",
    ]
    lines += [
        "request GET 404 1 /api/projects/7/next",
        "request GET 200 1 /health",
        "WSGI app 0 (mountpoint='')",
    ]
    found = within(lines)
    assert (found["lease"]["p50"], found["lease"]["p95"], found["lease"]["max"]) == (51.0, 96.0, 100.0)
    assert found["submit"]["p50"] == found["submit"]["max"] == 50.0
    assert within([])["lease"] is None


def test_the_table_has_a_row_for_each_server_and_kind_of_rater() -> None:
    seen = {
        "next_task_ms": {"p50": 1.5, "p95": 2.5},
        "submit_ms": {"p50": 3.5, "p95": 4.5},
        "answers_per_s": 7.5,
        "server_cpu_ms_per_answer": 6.5,
    }
    one = {
        "times": {kind: {"clients_see": seen} for kind in ("thinking", "without_pause")},
        "collected": {"full": 9, "too_many": 2},
    }
    lines = table({"accord": one, "label_studio": one})
    assert len(lines) == 6
    assert lines[2] == "| accord, thinking | 1.5, 2.5 | 3.5, 4.5 | 7.5 | 6.5 | 9 | 2 |"


def test_cpu_time_is_that_of_a_process_and_of_those_it_started() -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass\n"
    code = f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {spin!r}])\ntime.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            end_s = time.monotonic() + 60
            while processes.cpu_s([process.pid]) < 0.3 and time.monotonic() < end_s:
                time.sleep(0.05)
            assert processes.cpu_s([process.pid]) >= 0.3
            assert processes.cpu_s([os.getpid()]) >= processes.cpu_s([process.pid])
        finally:
            process.kill()
    assert processes.cpu_s([]) == processes.cpu_s([process.pid]) == 0.0


def test_the_postmaster_is_found_by_its_urls_directory(tmp_path: Path) -> None:
    url = f"postgresql://accord@/postgres?host={tmp_path}"
    assert processes.postmaster(url) == processes.postmaster("postgresql://u@db.example/accord") == []
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "postmaster.pid").write_text("4711\n/var/lib\n")
    assert processes.postmaster(url) == [4711]
