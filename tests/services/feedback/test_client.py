"""The Python client makes campaigns with gold and with comparisons, and rates in them, over a port."""

from collections.abc import Callable, Iterator

import pytest

from accord.client import ClientError, FeedbackClient, GoldImage, NotFound, SetComparison
from accord.errors import ConfigError
from accord.feedback import Campaigns, FeedbackStore
from tests.services.feedback.conftest import Running


@pytest.fixture
def running(start: Callable[..., Running]) -> Running:
    return start()


@pytest.fixture
def client(running: Running) -> Iterator[FeedbackClient]:
    with FeedbackClient(running.service.addresses["gRPC"], token=running.tokens["boss"]) as client:
        yield client


def test_gold_measures_a_rater(running: Running, client: FeedbackClient) -> None:
    with FeedbackStore(running.url) as store:
        known = [candidate for candidate in store.candidates() if candidate.prompt == "green square"]
    gold = [GoldImage(candidate.image, candidate.prompt, "good") for candidate in known]
    tasks = client.create_alignment("gold", "With gold", judgements_per_item=1, gold=gold)
    assert client.create_alignment("gold", "With gold", judgements_per_item=1, gold=gold) == tasks == 10
    seen = 0
    while (task := client.lease("gold", rater="ada", images=True)) is not None:
        assert [running.images.get(digest) for digest in task.images] == list(task.pngs)
        assert client.submit(
            task.task_id, ["bad"] * len(task.images), rater="ada", idempotency_key="k" * 8 + str(seen)
        )
        assert not client.submit(
            task.task_id, ["bad"] * len(task.images), rater="ada", idempotency_key="k" * 8 + str(seen)
        )
        seen += 1
    with Campaigns(running.url) as campaigns:
        assert campaigns.get("gold").complete
        (ada,) = campaigns.raters("gold")
    assert ada.gold_judged > 0
    assert ada.gold_accuracy == 0
    assert seen == 7 + ada.gold_judged // 3


def test_a_comparison_campaign(running: Running, client: FeedbackClient) -> None:
    with FeedbackStore(running.url) as store:
        images = [candidate.image for candidate in store.candidates()]
    sets = [
        SetComparison("two red stars", images[:4], images[4:8]),
        SetComparison("a green square", images[8:10], images[10:12], category="colour"),
    ]
    assert client.create_comparison("sets", "Which?", sets, judgements_per_item=1) == 4
    undone = False
    while (task := client.lease("sets", rater="ben")) is not None:
        first_is_left = task.images[0] in {*images[:4], *images[8:10]}
        assert task.question in ("alignment", "fidelity")
        answer = "tie" if task.question == "fidelity" else "left" if first_is_left else "right"
        assert client.submit(task.task_id, answer, rater="ben")
        if not undone:
            assert client.undo("sets", rater="ben") == task.task_id
            undone = True
    counts = {
        (row.prompt, row.question): (row.first, row.second, row.tie) for row in client.preferences("sets")
    }
    assert counts == {
        ("two red stars", "alignment"): (1, 0, 0),
        ("two red stars", "fidelity"): (0, 0, 1),
        ("a green square", "alignment"): (1, 0, 0),
        ("a green square", "fidelity"): (0, 0, 1),
    }


def test_refusals(running: Running, client: FeedbackClient) -> None:
    with pytest.raises(NotFound, match="no campaign 'none'"):
        client.lease("none", rater="ada")
    task = client.lease("shapes", rater="cleo")
    assert task is not None
    with pytest.raises(ConfigError, match="unknown preference 'better'"):
        client.submit(task.task_id, "better", rater="cleo")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown verdict 'fine'"):
        client.submit(task.task_id, ["fine"], rater="cleo")  # type: ignore[list-item]
    with pytest.raises(ClientError, match="expected 3 verdicts"):
        client.submit(task.task_id, ["good"], rater="cleo")
    assert client.undo("shapes", rater="cleo") is None
    robot = FeedbackClient(running.service.addresses["gRPC"], token=running.tokens["robot"])
    with robot, pytest.raises(ClientError, match="lacks the scope 'feedback'"):
        robot.create_alignment("x", "X", judgements_per_item=1)
