from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from accord.errors import FeedbackError
from accord.feedback import (
    AnsweredError,
    Campaigns,
    Candidate,
    ComparisonItem,
    ExcludedError,
    FeedbackStore,
    Gold,
    LeaseError,
    NotFoundError,
    Task,
)

MakeCandidate = Callable[..., Candidate]


class Clock:
    """Time that passes when we say so."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def campaigns(url: str, store: FeedbackStore, candidate: MakeCandidate, clock: Clock) -> Iterator[Campaigns]:
    """Seven images of "red star", two of "two stars"."""
    store.add_candidates(candidate(number) for number in range(1, 8))
    store.add_candidates(candidate(number, "two stars", "count") for number in (8, 9))
    with Campaigns(url, clock=clock) as campaigns:
        yield campaigns


def answer(campaigns: Campaigns, task: Task | None, rater: str, verdict: str = "good", key: str = "") -> bool:
    assert task is not None
    key = key or f"{task.task_id} {rater}"
    return campaigns.submit(task.task_id, rater, [verdict] * len(task.images), idempotency_key=key)


def judge_all(campaigns: Campaigns, campaign_id: str, rater: str, verdict: str = "good") -> list[Task]:
    done = []
    while (task := campaigns.lease(campaign_id, rater)) is not None:
        assert answer(campaigns, task, rater, verdict)
        done.append(task)
    return done


def test_alignment(campaigns: Campaigns, store: FeedbackStore) -> None:
    campaign = campaigns.create_alignment("first", "Red stars", judgements_per_item=2)
    assert (campaign.num_tasks, campaign.num_answers_wanted, campaign.complete) == (4, 8, False)
    seen = {rater: judge_all(campaigns, "first", rater) for rater in ("ann", "bob", "cat")}
    assert [len(tasks) for tasks in seen.values()] == [4, 4, 0]
    assert Counter(len(task.images) for task in seen["ann"]) == {3: 2, 2: 1, 1: 1}
    assert Counter(task.prompt for task in seen["ann"]) == {"red star": 3, "two stars": 1}
    assert Counter(row.count for row in store.vote_counts()) == {2: 9}
    assert campaigns.get("first").complete
    assert store.pending(2) == []
    assert [row.campaign_id for row in campaigns.all_judgements("first")] == ["first"] * 18


def test_the_same_campaign_is_made_once(campaigns: Campaigns, store: FeedbackStore) -> None:
    first = campaigns.create_alignment("c", "Title", judgements_per_item=2)
    store.add_candidates([Candidate("f" * 64, "star", "combination", "seen", 1, 64, 64)])
    assert campaigns.create_alignment("c", "Title", judgements_per_item=2) == first
    with pytest.raises(FeedbackError, match="campaign 'c' already, made with other settings"):
        campaigns.create_alignment("c", "Title", judgements_per_item=3)
    with pytest.raises(FeedbackError, match="no candidates of the sources nothing"):
        campaigns.create_alignment("d", "Title", judgements_per_item=1, sources=["nothing"])
    assert campaigns.campaigns() == [first]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"campaign_id": "a/b"}, "expected 1 to 64 letters"),
        ({"title": " "}, "title is empty"),
        ({"judgements_per_item": 0}, "integer from 1 to 25"),
        ({"lease_s": 0}, "expected seconds"),
        ({"seed": -1}, "seed is -1"),
        ({"images_per_task": 10}, "integer from 1 to 9"),
        ({"gold": [Gold("e" * 64, "star", "good")]}, "are no candidates of the store"),
        ({"gold": [Gold("e" * 64, "star", "skip")]}, "expected good or bad"),
    ],
)
def test_campaign_that_cannot_be(campaigns: Campaigns, change: dict[str, object], message: str) -> None:
    arguments = {"campaign_id": "c", "title": "Title", "judgements_per_item": 1, **change}
    with pytest.raises(FeedbackError, match=message):
        campaigns.create_alignment(**arguments)  # type: ignore[arg-type]
    assert campaigns.campaigns() == []


def test_a_rater_holds_one_task_and_the_next(campaigns: Campaigns) -> None:
    campaigns.create_alignment("c", "Title", judgements_per_item=1)
    now = campaigns.lease("c", "ann")
    again = campaigns.lease("c", "ann")
    assert now is not None
    assert again == now
    after = campaigns.lease("c", "ann", besides=now.task_id)
    assert after is not None
    assert after.task_id != now.task_id
    assert campaigns.lease("c", "ann", besides=now.task_id) == after
    assert campaigns.lease("c", "ann") == now
    assert campaigns.progress("c").leased == 2
    answer(campaigns, now, "ann")
    assert campaigns.lease("c", "ann") == after


def test_other_raters_get_other_tasks(campaigns: Campaigns) -> None:
    campaigns.create_alignment("c", "Title", judgements_per_item=1)
    tasks = [campaigns.lease("c", rater) for rater in ("ann", "bob", "cat", "dan", "eve")]
    assert len({task.task_id for task in tasks if task is not None}) == 4
    assert tasks[4] is None


def test_a_lease_that_runs_out_is_given_back(
    campaigns: Campaigns, clock: Clock, store: FeedbackStore
) -> None:
    campaigns.create_alignment("c", "Title", judgements_per_item=1, lease_s=60)
    taken = campaigns.lease("c", "ann")
    judge_all(campaigns, "c", "bob")
    assert campaigns.lease("c", "bob") is None
    clock.now_s += 61
    assert campaigns.progress("c").leased == 0
    given_back = campaigns.lease("c", "bob")
    assert taken is not None
    assert given_back is not None
    assert given_back.task_id == taken.task_id
    with pytest.raises(LeaseError, match="others have judged it since"):
        answer(campaigns, taken, "ann")
    answer(campaigns, given_back, "bob")
    assert {row.rater for row in store.judgements()} == {"bob"}
    assert campaigns.progress("c").expired == 1


def test_a_late_answer_counts_while_the_place_is_free(campaigns: Campaigns, clock: Clock) -> None:
    campaigns.create_alignment("c", "Title", judgements_per_item=1, lease_s=60)
    first, second = campaigns.lease("c", "ann"), campaigns.lease("c", "bob")
    clock.now_s += 61
    assert answer(campaigns, first, "ann")  # nobody noticed
    assert campaigns.expire("c") == 1
    assert answer(campaigns, second, "bob")  # given back, but not taken
    judge_all(campaigns, "c", "cat")
    assert campaigns.get("c").complete
    assert Counter(row.rater for row in campaigns.all_judgements("c")).keys() == {"ann", "bob", "cat"}


def test_answers_that_do_not_count_are_refused(campaigns: Campaigns) -> None:
    campaigns.create_alignment("c", "Title", judgements_per_item=2, images_per_task=2)
    task = campaigns.lease("c", "ann")
    assert task is not None
    for wrong in (["good"] * 5, "good", ["fine"] * len(task.images), None):
        with pytest.raises(FeedbackError, match="expected"):
            campaigns.submit(task.task_id, "ann", wrong, idempotency_key="key")  # type: ignore[arg-type]
    with pytest.raises(LeaseError, match="never leased to 'bob'"):
        answer(campaigns, task, "bob")
    for unknown in ("c.99", "d.1", "c", "c.-1", "c.1e3", "c.99999999999999999999"):
        with pytest.raises(NotFoundError, match="no task"):
            campaigns.submit(unknown, "ann", ["good"], idempotency_key="key")
    with pytest.raises(NotFoundError, match="no campaign 'd'"):
        campaigns.lease("d", "ann")
    assert answer(campaigns, task, "ann", key="one")
    assert not answer(campaigns, task, "ann", key="one")
    with pytest.raises(AnsweredError, match="answered the task"):
        answer(campaigns, task, "ann", key="two")
    with pytest.raises(AnsweredError, match="used before for something else"):
        answer(campaigns, task, "ann", "bad", key="one")
    with pytest.raises(AnsweredError, match="used before"):
        campaigns.undo("c", "ann", idempotency_key="one")
    assert campaigns.get("c").num_answers == 1


def test_undo(campaigns: Campaigns, store: FeedbackStore) -> None:
    campaigns.create_alignment("c", "Title", judgements_per_item=1)
    assert campaigns.undo("c", "ann", idempotency_key="too early") is None
    first = campaigns.lease("c", "ann")
    answer(campaigns, first, "ann", key="1")
    second = campaigns.lease("c", "ann")
    answer(campaigns, second, "ann", key="2")
    campaigns.lease("c", "ann")
    assert first is not None
    assert second is not None
    assert campaigns.undo("c", "ann", idempotency_key="3") == second.task_id
    assert campaigns.undo("c", "ann", idempotency_key="3") == second.task_id
    assert campaigns.undo("c", "ann", idempotency_key="too early") is None
    assert {row.image for row in store.judgements()} == set(first.images)
    assert len(store.judgements(everything=True)) == len(first.images) + len(second.images)
    again = campaigns.lease("c", "ann")
    assert again is not None
    assert again.task_id == second.task_id
    assert not answer(campaigns, second, "ann", key="2")  # an old message: it was counted, and taken back
    assert answer(campaigns, again, "ann", "bad", key="4")
    assert {row.verdict for row in store.judgements() if row.image in second.images} == {"bad"}
    assert campaigns.undo("c", "ann", idempotency_key="5") == second.task_id
    assert campaigns.undo("c", "ann", idempotency_key="6") == first.task_id
    assert campaigns.undo("c", "ann", idempotency_key="7") is None
    assert store.vote_counts() == []
    assert campaigns.get("c").num_answers == 0


def test_gold(campaigns: Campaigns, store: FeedbackStore, candidate: MakeCandidate) -> None:
    store.add_candidates(candidate(number, f"{number} stars", "count") for number in range(100, 140))
    gold = [Gold(f"{number:064x}", "red star", "good") for number in (1, 2, 3)]
    campaigns.create_alignment("c", "Title", judgements_per_item=1, images_per_task=1, gold=gold)
    right = judge_all(campaigns, "c", "ann", "good")
    assert len(right) == 46 + 3
    # What is left for bob is none of the k; gold comes between tasks only.
    assert campaigns.get("c").complete
    assert campaigns.progress("c").gold_tasks == 3
    (ann,) = campaigns.raters("c")
    assert (ann.gold_judged, ann.gold_accuracy, ann.answers) == (3, 1.0, 49)
    places = [i for i, task in enumerate(right) if {g.image for g in gold} & set(task.images)]
    assert [place // 10 for place in places] == [0, 1, 2]


def test_exclude(campaigns: Campaigns, store: FeedbackStore) -> None:
    campaigns.create_alignment("c", "Title", judgements_per_item=1)
    tasks = judge_all(campaigns, "c", "eve", "bad")
    assert campaigns.exclude("eve", "answers at random") == 4
    assert campaigns.exclude("eve", "again") == 0
    assert campaigns.excluded() == {"eve": "answers at random"}
    with pytest.raises(ExcludedError, match="'eve' was excluded"):
        campaigns.lease("c", "eve")
    with pytest.raises(ExcludedError, match="'eve' was excluded"):
        answer(campaigns, tasks[0], "eve", key="new")
    assert store.vote_counts() == []
    assert len(judge_all(campaigns, "c", "ann")) == 4
    assert {row.rater for row in store.judgements()} == {"ann"}
    assert [(row.rater, row.excluded) for row in campaigns.raters("c")] == [("ann", False), ("eve", True)]


def test_comparison(campaigns: Campaigns) -> None:
    items = [
        ComparisonItem(f"star {n}", [f"a{n}{i}" for i in range(4)], [f"b{n}{i}" for i in range(4)])
        for n in range(10)
    ]
    campaign = campaigns.create_comparison("c", "Which?", items, judgements_per_item=1)
    assert (campaign.kind, campaign.num_tasks) == ("comparison", 20)
    assert campaigns.create_comparison("c", "Which?", items, judgements_per_item=1) == campaign
    lefts = Counter()
    while (task := campaigns.lease("c", "ann")) is not None:
        assert (len(task.images), len(task.right_images)) == (4, 4)
        first_is_left = task.images[0].startswith("a")
        lefts[first_is_left] += 1
        given = "tie" if task.question == "fidelity" else "left" if first_is_left else "right"
        with pytest.raises(FeedbackError, match="expected one of left, right, tie"):
            campaigns.submit(task.task_id, "ann", ["good"], idempotency_key="k")
        assert campaigns.submit(task.task_id, "ann", given, idempotency_key=task.task_id)
    assert len(lefts) == 2  # the sides are shuffled
    assert campaigns.progress("c").preferences == {
        "alignment": {"first": 10, "second": 0, "tie": 0},
        "fidelity": {"first": 0, "second": 0, "tie": 10},
    }
    assert list(campaigns.all_judgements()) == []


def test_progress(campaigns: Campaigns, clock: Clock) -> None:
    campaigns.create_alignment("c", "Title", judgements_per_item=2, lease_s=60)
    judge_all(campaigns, "c", "ann", "good")
    for _ in range(2):
        assert campaigns.lease("c", "bob") is not None
        clock.now_s += 61
        campaigns.expire("c")
    progress = campaigns.progress("c")
    assert (progress.tasks, progress.tasks_done, progress.answers, progress.wanted) == (4, 0, 4, 8)
    assert (progress.raters, progress.expired, progress.leased) == (1, 2, 0)
    assert [task.expiries for task in progress.stuck] == [2]
    assert progress.shares["count"] == {
        "candidates": 2,
        "judgements": 2,
        "good": 1.0,
        "bad": 0.0,
        "skip": 0.0,
    }
    assert progress.shares_by_prompt["red star"]["judgements"] == 7


def test_raters(campaigns: Campaigns, clock: Clock) -> None:
    campaigns.create_alignment("c", "Title", judgements_per_item=3)
    for rater, verdict in (("ann", "good"), ("bob", "good"), ("cat", "bad")):
        while (task := campaigns.lease("c", rater)) is not None:
            clock.now_s += 5
            answer(campaigns, task, rater, verdict)
    rows = campaigns.raters("c")
    assert [(row.rater, row.answers, row.median_s, row.agreement) for row in rows] == [
        ("ann", 4, 5.0, 0.5),
        ("bob", 4, 5.0, 0.5),
        ("cat", 4, 5.0, 0.0),
    ]


def test_served_images(campaigns: Campaigns, store: FeedbackStore) -> None:
    image = f"{1:064x}"
    assert campaigns.record_served("image-1", image, "red star", "model")
    assert not campaigns.record_served("image-1", image, "red star", "model")
    with pytest.raises(FeedbackError, match="noted before as another"):
        campaigns.record_served("image-1", image, "star", "model")
    with pytest.raises(NotFoundError, match="no served image 'image-2'"):
        campaigns.served("image-2", "ann", "good", idempotency_key="k")
    judgement = campaigns.served("image-1", "ann", "good", idempotency_key="k")
    assert store.submit([judgement]) == 1
    assert [row.campaign_id for row in campaigns.all_judgements()] == [""]
