"""Label Studio for the comparison: its store filled, its server, and a rater's way to it.

It runs in an environment of its own: none of its code is imported here, and what its own interpreter is to
run is given to it as text.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy
from sqlalchemy import text

from benchmarks import feedback

# Run by Label Studio's interpreter: its tables, its users and two projects. Its answer is one line of JSON.
LEASE_TRIES = 100
SET_UP = """
import json, sys
import django
django.setup()
from django.core.management import call_command
call_command("migrate", "--no-color", verbosity=0)
from organizations.models import Organization
from projects.models import Project
from rest_framework.authtoken.models import Token
from users.models import User

asked = json.loads(sys.argv[1])
if not Organization.objects.exists():
    owner = User.objects.create_user(email="owner@example.org", password="none")
    organization = Organization.create_organization(created_by=owner, title="Benchmark")
    organization.jwt.legacy_api_tokens_enabled = True
    organization.jwt.save()
    for name in asked["old_raters"] + asked["raters"]:
        user = User(email=name + "@example.org", username=name, active_organization=organization)
        user.set_unusable_password()
        user.save()
        organization.add_user(user)
organization = Organization.objects.first()
made = []
for title in ("Done", "New"):
    if title == "New" or not Project.objects.filter(title=title).exists():
        made.append(Project.objects.create(
            title=title, created_by=organization.created_by, organization=organization,
            label_config=asked["label_config"], maximum_annotations=asked["wanted"],
            sampling=asked["sampling"],
        ).id)
names = {user.username: user.id for user in User.objects.all()}
tokens = {token.user_id: token.key for token in Token.objects.all()}
print("\\n" + json.dumps({
    "made": made,
    "tokens": {name: tokens[names[name]] for name in asked["raters"]},
    "old_raters": [names[name] for name in asked["old_raters"]],
}))
"""

TASKS = """
INSERT INTO task (data, meta, project_id, created_at, updated_at, is_labeled, overlap, inner_id,
                  total_annotations, cancelled_annotations, total_predictions, comment_count,
                  unresolved_comment_count, allow_skip)
SELECT jsonb_build_object('prompt', 'prompt ' || t, 'image', '/data/' || md5(CAST(t AS text)) || '.png'),
       '{}', :project, now(), now(), :done, :wanted, t + 1, CASE WHEN :done THEN :wanted ELSE 0 END,
       0, 0, 0, 0, true FROM generate_series(0, :tasks - 1) t
"""

ANSWERS = """
INSERT INTO task_completion (result, task_id, project_id, completed_by_id, updated_by_id, was_cancelled,
                             ground_truth, created_at, updated_at, lead_time, prediction, result_count,
                             unique_id, bulk_created)
SELECT CAST(:result AS jsonb), task.id, task.project_id, r, r, false, false, now(), now(), 5, '{}', 1,
       gen_random_uuid(), false
FROM task, generate_series(0, :wanted - 1) s,
     LATERAL (SELECT (CAST(:raters AS int[]))[1 + (task.inner_id * 7 + s * 100) % 300] AS r) rater
WHERE task.project_id = :project
"""

INDEXES = """
SELECT indexname, indexdef FROM pg_indexes
WHERE tablename = 'task_completion' AND indexname NOT IN (SELECT conname FROM pg_constraint)
"""

GIVEN = (
    "SELECT task_id, completed_by_id FROM task_completion WHERE project_id = :project AND NOT was_cancelled"
)

DONE = "SELECT count(*) FROM task_completion JOIN project ON project.id = project_id WHERE title = 'Done'"

LABELS = """
<View>
  <Text name="prompt" value="$prompt"/><Image name="image" value="$image"/>
  <Choices name="verdict" toName="image" choice="single"><Choice value="good"/><Choice value="bad"/></Choices>
</View>
"""
PROCESSES = 2 * (os.cpu_count() or 1)
LOG = "request %(method) %(status) %(micros) %(uri)"


class LabelStudio:
    """In a database of its own, and as a server over it."""

    def __init__(self, environment: Path, url: str, sampling: str) -> None:
        self._environment, self._sampling = environment.resolve(), sampling
        self._url = sqlalchemy.make_url(url)
        self._code = next(self._environment.glob("lib/python*/site-packages/label_studio"))
        self._tokens: dict[str, str] = {}
        self._project = 0

    def set_up(self, scale: float, raters: list[str]) -> None:
        """Its tables, users and projects by its own code; its tasks and answers by SQL."""
        old_images, images = feedback.sizes(scale)
        asked = {
            "raters": raters,
            "old_raters": [f"old-rater-{number}" for number in range(300)],
            "wanted": feedback.JUDGEMENTS,
            "sampling": f"{self._sampling} sampling",
            "label_config": LABELS,
        }
        start_s = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            command = [f"{self._environment}/bin/python", "-c", SET_UP, json.dumps(asked)]
            variables = self._variables(Path(scratch))
            done = subprocess.run(command, cwd=self._code, env=variables, stdout=subprocess.PIPE, check=True)
        made = json.loads(done.stdout.splitlines()[-1])
        feedback.say(f"Label Studio's tables and users in {time.perf_counter() - start_s:.1f} s")
        self._tokens, self._project = made["tokens"], made["made"][-1]
        sizes = [(self._project, images - old_images, False)]
        if len(made["made"]) == 2:
            sizes.append((made["made"][0], old_images, True))
        for project, tasks, is_done in sizes:
            self._fill(project, tasks, is_done, made["old_raters"])
        with self._engine().connect() as connection:
            found = connection.execute(text(DONE)).scalar_one()
        if found != old_images * feedback.JUDGEMENTS:
            sys.exit(f"the store has {found} annotations, not three for {old_images} tasks: remove it")

    def _fill(self, project: int, tasks: int, is_done: bool, raters: list[int]) -> None:
        values: dict[str, Any] = {"project": project, "wanted": feedback.JUDGEMENTS}
        start_s = time.perf_counter()
        with self._engine().begin() as connection:
            # Rows that are right by construction: no look-up of foreign keys, and indexes after them.
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
            connection.exec_driver_sql("SET LOCAL maintenance_work_mem = '256MB'")
            connection.execute(text(TASKS), {**values, "tasks": tasks, "done": is_done})
            if is_done:
                indexes = connection.execute(text(INDEXES)).all()
                for index, _ in indexes:
                    connection.exec_driver_sql(f'DROP INDEX "{index}"')
                given = {**values, "raters": raters, "result": json.dumps(answer("good"))}
                connection.execute(text(ANSWERS), given)
                for _, definition in indexes:
                    connection.exec_driver_sql(definition)
        with self._engine().begin() as connection:
            connection.exec_driver_sql("ANALYZE")
        feedback.say(f"filled a project with {tasks} tasks in {time.perf_counter() - start_s:.1f} s")

    def given(self) -> list[tuple[object, object]]:
        """Task and rater of each answer in the project that began."""
        with self._engine().connect() as connection:
            return [(row[0], row[1]) for row in connection.execute(text(GIVEN), {"project": self._project})]

    def door(self, client: httpx.Client, prefix: str) -> "OverHttp":
        return OverHttp(client, self._project, self._tokens, prefix)

    @contextlib.contextmanager
    def served(self, scratch: Path) -> Iterator[tuple[str, Path, int]]:
        """Its address, its log with a line a request (`LOG`), and its first process."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        log = scratch / "log"
        command = [
            f"{self._environment}/bin/uwsgi", "--http", address, "--module", "core.wsgi:application",
            "--virtualenv", str(self._environment), "--master", "--single-interpreter", "--enable-threads",
            "--processes", str(PROCESSES), "--threads", "1", "--lazy-apps", "--thunder-lock", "--need-app",
            "--die-on-term", "--buffer-size", "65535", "--http-timeout", "600", "--post-buffering", "4096",
            "--log-format", LOG,
        ]  # fmt: skip
        with log.open("w") as lines:
            served = subprocess.Popen(
                command, cwd=self._code, env=self._variables(scratch), stdout=lines, stderr=subprocess.STDOUT
            )
        try:
            self._wait(served, address, log)
            yield f"http://{address}", log, served.pid
        finally:
            served.terminate()
            served.wait(timeout=60)

    @staticmethod
    def _wait(served: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
        """Until all its processes answer: each loads the application by itself."""
        while log.read_text().count("WSGI app 0 ") < PROCESSES:
            if served.poll() is not None:
                sys.exit(f"Label Studio ended: {log.read_text()[-2000:]}")
            time.sleep(0.5)
        httpx.get(f"http://{address}/health", timeout=60).raise_for_status()

    def _variables(self, scratch: Path) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(self._code), "BASE_DATA_DIR": str(scratch),
            "DJANGO_SETTINGS_MODULE": "core.settings.label_studio", "DJANGO_DB": "default",
            "POSTGRE_HOST": str(self._url.query["host"]), "POSTGRE_USER": str(self._url.username),
            "POSTGRE_NAME": str(self._url.database), "POSTGRE_PASSWORD": "none", "LOG_LEVEL": "CRITICAL",
            "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": "", "COLLECT_ANALYTICS": "false",
            "LATEST_VERSION_CHECK": "false", "DEBUG": "false",
        }  # fmt: skip

    def _engine(self) -> sqlalchemy.Engine:
        url = self._url.set(drivername="postgresql+psycopg")
        return sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)


class OverHttp:
    """A rater's way to Label Studio."""

    def __init__(self, client: httpx.Client, project: int, user_tokens: dict[str, str], prefix: str) -> None:
        self._client, self._project = client, project
        self._tokens, self._prefix = user_tokens, prefix
        self._lock = threading.Lock()
        self.failed = 0

    def lease(self, rater: str) -> tuple[str, int] | None:
        for _ in range(LEASE_TRIES):
            reply = self._client.get(f"/api/projects/{self._project}/next", headers=self._headers(rater))
            if reply.status_code == 404:
                return None
            if reply.is_success:
                return str(reply.json()["id"]), 1
            self._count(reply)
        raise SystemExit(f"Label Studio failed {LEASE_TRIES} times to give a task: see its log")

    def submit(self, rater: str, task: str, images: int) -> None:
        body = {"result": answer("good"), "lead_time": 1.0}
        self._count(
            self._client.post(f"/api/tasks/{task}/annotations/", json=body, headers=self._headers(rater))
        )

    def _headers(self, rater: str) -> dict[str, str]:
        return {"Authorization": f"Token {self._tokens[self._prefix + rater]}"}

    def _count(self, reply: httpx.Response) -> None:
        if reply.is_success:
            return
        if reply.is_client_error:
            reply.raise_for_status()
        with self._lock:
            self.failed += 1


def answer(verdict: str) -> list[dict[str, Any]]:
    """An annotation's result, as Label Studio's page writes it."""
    choice = {"from_name": "verdict", "to_name": "image", "type": "choices", "value": {"choices": [verdict]}}
    return [{"id": "one", **choice}]
