"""The page's HTTP: who comes in, what is refused, and what the store then holds."""

import contextlib
import re
import sqlite3
from collections.abc import Callable

import httpx
import pytest

from accord.feedback import Campaigns, FeedbackStore
from services.feedback.access import RATER_COOKIE
from services.feedback.signing import Signer
from tests.services.feedback.conftest import PROMPTS, Rater, Running

KEY = "0123456789abcdef"


def _verdicts(task: dict[str, list[str]]) -> list[str]:
    return ["good", "bad", "skip"][: len(task["images"])]


def test_a_rater_answers(start: Callable[..., Running]) -> None:
    running = start()
    rater = running.enter("ann")
    task = rater.next()
    image = rater.client.get(f"/images/{task['images'][0]}")
    assert image.content == running.images.get(task["images"][0])
    assert image.headers["content-type"] == "image/png"
    reply = rater.answer(task["task_id"], KEY, verdicts=_verdicts(task))
    assert reply.json() == {"counted": True, "progress": {"mine": 1, "answered": 0, "wanted": 10}}
    with FeedbackStore(running.url) as store:
        assert {(row.image, row.rater, row.verdict) for row in store.judgements()} == {
            (image, "ann", verdict) for image, verdict in zip(task["images"], _verdicts(task), strict=True)
        }


def test_the_next_task_is_another(service: Running) -> None:
    rater = service.enter("ahead")
    first = rater.next()
    assert rater.next(first["task_id"])["task_id"] != first["task_id"]
    assert rater.next()["task_id"] == first["task_id"]


def test_an_answer_counts_once(service: Running) -> None:
    rater = service.enter("twice")
    task = rater.next()
    replies = [rater.answer(task["task_id"], KEY, verdicts=_verdicts(task)) for _ in range(3)]
    assert [reply.json()["counted"] for reply in replies] == [True, False, False]
    assert replies[-1].json()["progress"]["mine"] == 1
    other = rater.answer(task["task_id"], "another-key", verdicts=_verdicts(task))
    assert (other.status_code, other.json()["reason"]) == (409, "ANSWERED_BEFORE")


def test_two_raters_may_choose_the_same_key(service: Running) -> None:
    for name in ("same-1", "same-2"):
        rater = service.enter(name)
        task = rater.next()
        assert rater.answer(task["task_id"], "the-same-key", verdicts=_verdicts(task)).json()["counted"]


def test_undo_gives_the_task_back(service: Running) -> None:
    rater = service.enter("undoer")
    task = rater.next()
    rater.answer(task["task_id"], KEY, verdicts=_verdicts(task))
    following = rater.next()
    undone = rater.call("/api/undo", {"idempotency_key": "undo-0001"}).json()
    assert undone["task_id"] == undone["task"]["task_id"] == task["task_id"] != following["task_id"]
    assert undone["progress"]["mine"] == 0
    again = rater.call("/api/undo", {"idempotency_key": "undo-0001"}).json()
    assert again["task_id"] == task["task_id"]
    assert rater.call("/api/undo", {"idempotency_key": "undo-0002"}).json()["task_id"] is None
    assert rater.answer(task["task_id"], "second-answer", verdicts=["bad"] * len(task["images"])).json()[
        "counted"
    ]


def test_a_comparison(service: Running) -> None:
    rater = service.enter("judge", "models")
    task = rater.next()
    assert task["question"] in ("alignment", "fidelity")
    assert len(task["images"]) == len(task["right_images"]) == 4
    assert rater.answer(task["task_id"], KEY, preference="left").json()["counted"]


@pytest.mark.parametrize(
    "body",
    [
        {"idempotency_key": KEY},
        {"idempotency_key": KEY, "verdicts": ["good"], "preference": "left"},
        {"idempotency_key": KEY, "verdicts": ["splendid"] * 3},
        {"idempotency_key": KEY, "verdicts": ["good"] * 40},
        {"idempotency_key": "short", "verdicts": ["good"] * 3},
        {"idempotency_key": KEY, "verdicts": ["good"] * 3, "rater": "somebody"},
        {"idempotency_key": KEY, "preference": "left"},
    ],
)
def test_what_is_no_answer_is_refused(service: Running, body: dict[str, object]) -> None:
    rater = service.enter("careless")
    task = rater.next()
    reply = rater.call(f"/api/tasks/{task['task_id']}/answer", body)
    assert reply.status_code == 400
    assert reply.json()["reason"] == "INVALID_REQUEST"


def test_a_task_of_another_campaign_is_refused(service: Running) -> None:
    other = service.enter("stray", "models").next()
    reply = service.enter("stray").answer(other["task_id"], KEY, preference="left")
    assert (reply.status_code, reply.json()["reason"]) == (404, "NOT_FOUND")


# --- who comes in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/rate", f"/images/{'a' * 64}"])
def test_nothing_without_a_session(service: Running, path: str) -> None:
    with service.client() as client:
        assert client.get(path).status_code == 401


def test_the_api_wants_a_session(service: Running) -> None:
    with service.client() as client:
        reply = client.post("/api/next", json={"held": []}, headers={"X-CSRF-Token": "x"})
    assert (reply.status_code, reply.json()["reason"]) == (401, "SESSION_INVALID")


def _open(client: httpx.Client, path: str) -> httpx.Response:
    """What the button on the link's page does."""
    return client.post("/invite", data={"token": path.rpartition("/")[2]})


def test_looking_at_a_link_does_not_use_it_up(service: Running) -> None:
    path = service.invite("previewed")
    with service.client() as client:
        for _ in range(2):
            page = client.get(path)
            assert page.status_code == 200
            assert "Shapes &amp; &lt;more&gt;" in page.text
        assert _open(client, path).status_code == 303


def test_a_link_opens_once(service: Running) -> None:
    path = service.invite("once")
    with service.client() as first, service.client() as second:
        assert _open(first, path).status_code == 303
        replayed = _open(second, path)
        assert replayed.status_code == 401
        assert "opens only once" in replayed.text
        assert not second.cookies
        assert second.get("/rate").status_code == 401
        assert _open(first, path).status_code == 303  # who has its session may


def test_who_was_not_answered_comes_in_with_the_same_browser(service: Running) -> None:
    path = service.invite("unlucky")
    with service.client() as browser, service.client() as other:
        assert browser.get(path).status_code == 200
        (door,) = (cookie for cookie in browser.cookies.jar if cookie.name == "accord_door")
        other.get(path)
        assert _open(browser, path).status_code == 303
        assert set(browser.cookies) == {"accord_rater"}  # the answer ends it
        browser.cookies.clear()
        browser.cookies.jar.set_cookie(door)  # as if that answer had never come
        assert _open(other, path).status_code == 401
        assert browser.get("/rate").status_code == 401  # it lets nobody in by itself
        assert browser.get(path).status_code == 200
        assert _open(browser, path).status_code == 303
        assert browser.get("/rate").status_code == 200
        browser.cookies.clear()
        browser.cookies.jar.set_cookie(door)
        assert _open(browser, service.invite("somebody")).status_code == 303
        assert service.signer.read_session("rater", browser.cookies["accord_rater"]).rater == "somebody"


def test_an_expired_link(service: Running) -> None:
    path = service.invite("late", hours=1e-9)
    with service.client() as client:
        for reply in (client.get(path), _open(client, path)):
            assert reply.status_code == 401
            assert "expired" in reply.text
        assert not client.cookies


def _altered(signed: str) -> str:
    """With another character in the signature; not the last one, which has bits that mean nothing."""
    return signed[:-5] + ("A" if signed[-5] != "A" else "B") + signed[-4:]


def test_a_tampered_link(service: Running) -> None:
    path = service.invite("tampered")
    forged = Signer("x" * 48).make_invite("shapes", "forger", 1)[0]
    with service.client() as client:
        for changed in (
            _altered(path),
            path[:9] + path[10:],
            f"/invite/{forged}",
        ):
            assert client.get(changed).status_code == 401
            assert _open(client, changed).status_code == 401
        assert not client.cookies


def test_another_raters_link(service: Running) -> None:
    ann = service.enter("ann-2")
    path = service.invite("ben-2")
    refused = _open(ann.client, path)
    assert refused.status_code == 403
    assert "ann-2 is rating" in refused.text
    assert ann.client.get("/rate").status_code == 200
    with service.client() as client:  # and it was not used up
        assert _open(client, path).status_code == 303


def test_who_leaves_may_open_another_raters_link(service: Running) -> None:
    ann = service.enter("ann-3")
    refused = _open(ann.client, service.invite("ben-3")).text
    csrf = re.search(r'name="csrf_token" value="([^"]+)"', refused)
    assert csrf
    assert ann.client.post("/leave", data={"csrf_token": csrf[1]}).status_code == 200
    assert ann.client.get("/rate").status_code == 401
    assert _open(ann.client, service.invite("ben-3")).status_code == 303


def test_a_session_cannot_be_forged(service: Running) -> None:
    signer, strange = service.signer, Signer("y" * 48)
    session = signer.start_session("rater", "eve", 1, "shapes")
    invite = service.invite("eve").rpartition("/")[2]
    ended = signer.start_session("rater", "eve", -1, "shapes")
    good = signer.write_session("rater", session)
    for cookie in (
        strange.write_session("rater", session),
        signer.write_session("operator", session),
        signer.write_session("rater", ended),
        _altered(good),
        invite,
        "",
    ):
        with service.client() as client:
            client.cookies.set(RATER_COOKIE, cookie)
            assert client.get("/rate").status_code == 401
    with service.client() as client:
        client.cookies.set(RATER_COOKIE, good)
        assert client.get("/rate").status_code == 200  # so that the others fail for what is wrong with them


def test_the_cookie_is_out_of_reach(service: Running) -> None:
    with service.client() as client:
        cookie = _open(client, service.invite("cookie")).headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "secure" not in cookie


def test_behind_https_the_cookie_is_secure(start: Callable[..., Running]) -> None:
    running = start(public_url="https://rate.example.org")
    page = f"http://127.0.0.1:{running.service.port}"
    with httpx.Client(base_url=page, timeout=60) as client:
        cookie = _open(client, running.invite("ann")).headers["set-cookie"].lower()
    assert "; secure" in cookie


def test_an_excluded_rater_is_told(service: Running) -> None:
    rater = service.enter("rogue")
    with Campaigns(service.url) as campaigns:
        campaigns.exclude("rogue", "always good")
    reply = rater.call("/api/next", {"held": []})
    assert (reply.status_code, reply.json()["reason"]) == (403, "RATER_EXCLUDED")


# --- what else may not work -------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "wrong", None])
def test_without_the_csrf_token_nothing_happens(service: Running, token: str | None) -> None:
    rater = service.enter("csrf")
    task = rater.next()
    headers = {} if token is None else {"X-CSRF-Token": token}
    path, body = f"/api/tasks/{task['task_id']}/answer", {"idempotency_key": KEY, "verdicts": _verdicts(task)}
    for reply in (
        rater.client.post(path, json=body, headers=headers),
        rater.client.post("/api/next", json={"held": []}, headers=headers),
        rater.client.post("/api/undo", json={"idempotency_key": KEY}, headers=headers),
    ):
        assert (reply.status_code, reply.json()["reason"]) == (403, "FORBIDDEN")
    assert rater.next()["task_id"] == task["task_id"]


def test_the_csrf_token_of_another_session_is_none(service: Running) -> None:
    mine, other = service.enter("csrf-1"), service.enter("csrf-2")
    reply = mine.client.post("/api/next", json={"held": []}, headers={"X-CSRF-Token": other.csrf})
    assert reply.status_code == 403


def test_another_site_is_refused_even_with_the_token(service: Running) -> None:
    rater = service.enter("cross")
    reply = rater.call("/api/next", {"held": []}, **{"Sec-Fetch-Site": "cross-site"})
    assert reply.status_code == 403


@pytest.mark.parametrize(
    "path",
    [
        "/static/../config.py",
        "/static/..%2fconfig.py",
        "/static/%2e%2e%2fconfig.py",
        "/static/rate.html",
        "/static/....//config.py",
        "/images/../feedback.db",
        "/images/..%2f..%2ffeedback.db",
        "/images/%2e%2e%2ffeedback.db",
        "/images/" + "A" * 64,
        "/images/" + "0" * 64,
        "/images//etc/passwd",
    ],
)
def test_no_path_leads_out(service: Running, path: str) -> None:
    rater = service.enter("walker")
    # As bytes of the request's own: httpx would tidy the path.
    reply = rater.client.send(rater.client.build_request("GET", "/", extensions={"target": path.encode()}))
    assert reply.status_code == 404
    assert "import" not in reply.text
    assert "SQLite" not in reply.text


def test_prompts_and_titles_are_text(service: Running) -> None:
    rater = service.enter("reader")
    page = rater.client.get("/rate").text
    assert "Shapes &amp; &lt;more&gt;" in page
    assert "<more>" not in page
    assert "<script>" not in page  # there is no inline script at all
    prompts = set()
    for number in range(10):
        task = rater.next()
        prompts.add(task["prompt"])
        rater.answer(task["task_id"], f"{KEY}-{number}", verdicts=["good"] * len(task["images"]))
    assert prompts == set(PROMPTS)  # as they are: the page's script writes them as text
    assert rater.next() is None


@pytest.mark.parametrize("path", ["/rate", "/static/rate.js", "/nowhere", "/api/nowhere", "/operator/login"])
def test_every_answer_protects_the_browser(service: Running, path: str) -> None:
    headers = service.enter("headers").client.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "server" not in headers


def test_a_large_request_is_refused(service: Running) -> None:
    rater = service.enter("large")
    reply = rater.call("/api/next", {"held": ["x" * 100_000]})
    assert reply.status_code == 400


def test_the_store_away_is_not_the_raters_fault(start: Callable[..., Running]) -> None:
    """The page tries again after a 503; it would give an answer up after a 4xx."""
    running = start()
    rater = running.enter("ann")
    task = rater.next()
    database = str(running.config.images.parent / "feedback.db")
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection:
        connection.execute("ALTER TABLE answers RENAME TO away")
        reply = rater.answer(task["task_id"], KEY, verdicts=_verdicts(task))
        assert (reply.status_code, reply.json()["reason"]) == (503, "STORE_UNAVAILABLE")
        assert database not in reply.text
        connection.execute("ALTER TABLE away RENAME TO answers")
    assert rater.answer(task["task_id"], KEY, verdicts=_verdicts(task)).json()["counted"]


# --- the operator -----------------------------------------------------------------------------------------


def _sign_in(running: Running, name: str) -> httpx.Client:
    client = running.client()
    client.post("/operator/login", data={"token": running.tokens[name]})
    return client


def test_an_operator_sees_and_invites(service: Running) -> None:
    rater = service.enter("seen-by-the-operator")
    task = rater.next()
    rater.answer(task["task_id"], KEY, verdicts=["good"] * len(task["images"]))
    with contextlib.closing(_sign_in(service, "boss")) as client:
        page = client.get("/operator?campaign=shapes").text
        assert "seen-by-the-operator" in page
        assert "Shapes &amp; &lt;more&gt;" in page
        assert "<more>" not in page
        csrf = re.search(r'name="csrf_token" value="([^"]+)"', page)
        assert csrf
        form = {"csrf_token": csrf[1], "campaign": "shapes", "rater": "invited", "hours": "2"}
        link = re.search(r'value="(http[^"]+/invite/[^"]+)"', client.post("/operator/invite", data=form).text)
        assert link
        assert client.post("/operator/invite", data={**form, "csrf_token": "no"}).status_code == 403
        assert client.post("/operator/invite", data={**form, "rater": "../x"}).status_code == 400
    with service.client() as browser:
        assert _open(browser, link[1]).status_code == 303
        assert Rater(browser).next() is not None


@pytest.mark.parametrize("name", ["robot", "nobody"])
def test_a_token_without_the_scope_is_no_operators(service: Running, name: str) -> None:
    with contextlib.closing(_sign_in(service, name)) as client:
        assert not client.cookies
        assert client.get("/operator").headers["location"] == "/operator/login"


def test_a_rater_is_no_operator(service: Running) -> None:
    client = service.enter("curious").client
    assert client.get("/operator").headers["location"] == "/operator/login"
    assert (
        client.post("/operator/invite", data={"campaign": "shapes"}).headers["location"] == "/operator/login"
    )


# --- metrics ----------------------------------------------------------------------------------------------


def test_metrics(start: Callable[..., Running]) -> None:
    running = start()
    rater = running.enter("ann")
    task = rater.next()
    rater.answer(task["task_id"], KEY, verdicts=["good", "bad", "skip"])
    rater.answer(task["task_id"], KEY, verdicts=["good", "bad", "skip"])  # counted once
    rater.answer(task["task_id"], "another-key", verdicts=["good", "bad", "skip"])
    rater.call("/api/undo", {"idempotency_key": "undo-0001"})
    rater.answer(task["task_id"], "third-answer", verdicts=["good", "good", "bad"])
    text = httpx.get(running.service.addresses["metrics"], timeout=60).text
    lines = set(text.splitlines())
    assert 'accord_feedback_judgements_total{kind="alignment",verdict="good"} 3.0' in lines
    assert 'accord_feedback_judgements_total{kind="alignment",verdict="bad"} 2.0' in lines
    assert 'accord_feedback_judgements_total{kind="alignment",verdict="skip"} 1.0' in lines
    assert 'accord_feedback_refusals_total{reason="ANSWERED_BEFORE"} 1.0' in lines
    assert "accord_feedback_undos_total 1.0" in lines
    assert 'accord_feedback_leases_total{kind="alignment"} 1.0' in lines
    assert 'accord_feedback_operation_seconds_count{operation="submit"} 4.0' in lines
    assert 'accord_feedback_answers{campaign="shapes"} 1.0' in lines
    assert 'accord_feedback_answers_wanted{campaign="shapes"} 10.0' in lines
    assert 'accord_feedback_leases_expired{campaign="shapes"} 0.0' in lines
    good = next(line for line in lines if line.startswith('accord_feedback_good_ratio{campaign="shapes"}'))
    assert float(good.split()[1]) == pytest.approx(2 / 3)
    assert "ann" not in text  # raters are no labels
