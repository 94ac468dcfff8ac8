"""A rater is excluded, and taken back: every image keeps exactly the wanted judgements."""

from collections import Counter
from collections.abc import Iterator

import pytest
from sqlalchemy import select

from accord.feedback import Campaigns, FeedbackStore, Gold, Judgement, exclusion
from accord.feedback.campaign_tables import exclusion_events
from tests.feedback.conftest import make_candidate

TASKS = 4
IMAGES = 3 * TASKS


@pytest.fixture
def campaigns(url: str, store: FeedbackStore) -> Iterator[Campaigns]:
    store.add_candidates(make_candidate(number) for number in range(IMAGES))
    with Campaigns(url) as campaigns:
        campaigns.create_alignment("c", "Title", judgements_per_item=2)
        yield campaigns


def _judge(campaigns: Campaigns, rater: str, number: int = TASKS, campaign: str = "c") -> int:
    """Answers so many tasks at most; how many there were."""
    for done in range(number):
        task = campaigns.lease(campaign, rater)
        if task is None:
            return done
        key = f"{rater} {task.task_id}"
        campaigns.submit(task.task_id, rater, ["good"] * len(task.images), idempotency_key=key)
    return number


def _counted(store: FeedbackStore) -> Counter[str]:
    return Counter(row.rater for row in store.judgements())


def test_taken_back_when_nobody_took_the_places(campaigns: Campaigns, store: FeedbackStore) -> None:
    _judge(campaigns, "ann")
    _judge(campaigns, "eve", 2)
    campaigns.lease("c", "eve")  # and holds one
    assert campaigns.exclude("eve", "a mistake") == 3
    assert campaigns.get("c").num_answers == TASKS
    assert campaigns.include("eve", "it was not her") == 2
    assert campaigns.excluded() == {}
    assert campaigns.include("eve", "again") is None
    assert campaigns.include("bob", "was never excluded") is None
    assert campaigns.get("c").num_answers == TASKS + 2
    assert campaigns.answered_by("c", "eve") == 2
    assert _counted(store) == {"ann": IMAGES, "eve": 6}
    assert _judge(campaigns, "eve") == TASKS - 2  # she goes on, with what she has not judged
    assert campaigns.get("c").complete
    assert _counted(store) == {"ann": IMAGES, "eve": IMAGES}


def test_answers_whose_places_others_took_are_taken_back(campaigns: Campaigns, store: FeedbackStore) -> None:
    _judge(campaigns, "ann")
    _judge(campaigns, "eve")
    campaigns.exclude("eve", "a mistake")
    _judge(campaigns, "bob", 3)
    assert campaigns.include("eve", "it was not her") == 1
    campaign = campaigns.get("c")
    assert (campaign.num_answers, campaign.num_answers_wanted) == (8, 8)
    assert campaigns.answered_by("c", "eve") == 1
    counts = Counter(row.image for row in store.judgements())
    assert counts == {f"{number:064x}": 2 for number in range(IMAGES)}
    assert _counted(store) == {"ann": IMAGES, "bob": 9, "eve": 3}
    assert len(store.judgements(everything=True)) == IMAGES + 9 + IMAGES  # nothing was removed
    assert campaigns.lease("c", "eve") is None
    assert {row.rater: row.answers for row in campaigns.raters("c")} == {"ann": 4, "bob": 3, "eve": 1}


def test_again_and_again(campaigns: Campaigns, store: FeedbackStore) -> None:
    _judge(campaigns, "ann")
    _judge(campaigns, "eve")
    for _ in range(3):
        assert campaigns.exclude("eve", "so") == TASKS
        assert campaigns.include("eve", "no") == TASKS
    assert _counted(store) == {"ann": IMAGES, "eve": IMAGES}
    with campaigns._database.reading() as connection:
        kinds = (
            connection.execute(select(exclusion_events.c.kind).order_by(exclusion_events.c.id))
            .scalars()
            .all()
        )
    assert kinds == ["exclude", "include"] * 3


def test_excluded_and_taken_back_at_once(campaigns: Campaigns, store: FeedbackStore) -> None:
    """Two operators: each step of theirs is a transaction, and they may come in any order."""
    _judge(campaigns, "ann")
    _judge(campaigns, "eve")
    campaigns.exclude("eve", "so")
    write = campaigns._database.write
    assert write(lambda now: exclusion.restore(now, "eve", 1)) == (TASKS, TASKS)
    assert write(lambda now: exclusion.withdraw(now, "eve")) == TASKS  # the other one is not done yet
    with pytest.raises(exclusion.PlacesLeftError):
        write(lambda now: exclusion.include(now, "eve", "no", 1))
    assert campaigns.include("eve", "no") == TASKS
    assert write(lambda now: exclusion.withdraw(now, "eve")) == 0  # too late
    assert campaigns.get("c").num_answers == 2 * TASKS
    assert campaigns.lease("c", "bob") is None
    assert _counted(store) == {"ann": IMAGES, "eve": IMAGES}


def test_gold_and_judgements_without_a_campaign(campaigns: Campaigns, store: FeedbackStore) -> None:
    known = [Gold(f"{number:064x}", "red star", "good") for number in range(3)]
    campaigns.create_alignment("g", "Gold", judgements_per_item=1, images_per_task=1, gold=known)
    answered = _judge(campaigns, "eve", 100, "g")
    (before,) = campaigns.raters("g")
    assert before.gold_judged == answered - 9 > 0
    store.submit([Judgement("served", f"{0:064x}", "red star", "eve", "bad")])
    campaigns.exclude("eve", "so")
    assert campaigns.get("g").num_answers == 0
    assert store.judgements() == []
    assert campaigns.include("eve", "no") == answered
    assert campaigns.get("g").complete
    assert len(store.judgements()) == answered + 1
    (after,) = campaigns.raters("g")
    assert after.gold_judged == before.gold_judged
