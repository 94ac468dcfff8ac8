import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from accord.errors import FeedbackError
from accord.feedback import Candidate, FeedbackStore, Judgement

MakeCandidate = Callable[..., Candidate]
MakeJudgement = Callable[..., Judgement]


def test_what_goes_in_comes_out(
    store: FeedbackStore, url: str, candidate: MakeCandidate, judgement: MakeJudgement
) -> None:
    new = [
        Candidate("b" * 64, "zwei Sterne ★", "count", "seen", 2**63 - 1, 48, 64, source="c" * 64),
        candidate(1),
    ]
    assert store.add_candidates(new) == 2
    assert store.submit([judgement(1, "skip", key="second"), judgement(1, "bad", "bob", key="first")]) == 2
    assert store.submit([judgement(1, "good", key="alone")]) == 1
    with FeedbackStore(url) as again:
        assert again.candidates() == [new[1], new[0]]
        assert [(row.idempotency_key, row.rater, row.verdict) for row in again.judgements()] == [
            ("first", "bob", "bad"),
            ("second", "ann", "skip"),
            ("alone", "ann", "good"),
        ]


def test_candidates_are_added_once(store: FeedbackStore, candidate: MakeCandidate) -> None:
    assert store.add_candidates([candidate(1), candidate(2), candidate(1)]) == 2
    # The same image for another prompt is another candidate.
    assert store.add_candidates([candidate(1), candidate(3), candidate(1, "star", "combination")]) == 2
    assert store.add_candidates([]) == 0
    assert len(store.candidates()) == 4


def test_two_seeds_may_give_the_same_image(store: FeedbackStore) -> None:
    first = Candidate("a" * 64, "red star", "colour", "seen", 1, 64, 64)
    second = Candidate("a" * 64, "red star", "colour", "seen", 2, 64, 64)
    assert store.add_candidates([first, second]) == 1
    assert store.add_candidates([second]) == 0
    assert store.candidates() == [first]


def test_more_rows_than_one_statement_holds(
    store: FeedbackStore, candidate: MakeCandidate, judgement: MakeJudgement
) -> None:
    numbers = range(1203)
    assert store.add_candidates(candidate(number) for number in numbers) == 1203
    assert store.submit(judgement(number) for number in numbers) == 1203
    assert store.submit(judgement(number) for number in range(1210 - 7)) == 0
    assert len(store.judgements()) == 1203


def test_the_same_key_counts_once(
    store: FeedbackStore, candidate: MakeCandidate, judgement: MakeJudgement
) -> None:
    store.add_candidates([candidate(1)])
    assert store.submit([judgement(1), judgement(1)]) == 1
    assert store.submit([judgement(1)]) == 0
    assert store.submit([judgement(1), judgement(1, "bad", "bob")]) == 1
    assert store.submit([]) == 0
    assert len(store.judgements()) == 2


def test_a_key_cannot_name_two_judgements(
    store: FeedbackStore, candidate: MakeCandidate, judgement: MakeJudgement
) -> None:
    store.add_candidates([candidate(1), candidate(2)])
    store.submit([judgement(1, "good", key="k")])
    with pytest.raises(FeedbackError, match=r"'k' was used before .* differs in verdict\)"):
        store.submit([judgement(2), judgement(1, "bad", key="k")])
    with pytest.raises(FeedbackError, match=r"'l' was used before .* differs in image, rater\)"):
        store.submit([judgement(1, key="l"), judgement(2, rater="bob", key="l")])
    assert [row.verdict for row in store.judgements()] == ["good"]


def test_concurrent_submits_of_the_same_judgements(
    store: FeedbackStore, candidate: MakeCandidate, judgement: MakeJudgement
) -> None:
    """Eight clients send the same 60 judgements in batches of other sizes and orders: each counts once."""
    threads = 8
    store.add_candidates(candidate(number) for number in range(20))
    wanted = [judgement(number, rater=rater) for number in range(20) for rater in ("ann", "bob", "cat")]
    barrier = threading.Barrier(threads)

    def client(index: int) -> int:
        order = wanted[index:] + wanted[:index]
        if index % 2:
            order.reverse()
        size = (1, 2, 3, 5, 7, 20, 60, 60)[index]
        barrier.wait()
        return sum(store.submit(order[start : start + size]) for start in range(0, len(order), size))

    with ThreadPoolExecutor(threads) as pool:
        stored = list(pool.map(client, range(threads)))
    assert sum(stored) == len(wanted)
    assert sorted(row.idempotency_key for row in store.judgements()) == sorted(
        row.idempotency_key for row in wanted
    )


def test_concurrent_adding_of_the_same_candidates(store: FeedbackStore, candidate: MakeCandidate) -> None:
    threads = 8
    wanted = [candidate(number, prompt) for number in range(500) for prompt in ("red star", "star")]
    barrier = threading.Barrier(threads)

    def client(index: int) -> int:
        order = wanted if index % 2 else wanted[::-1]  # so that each could wait for the other
        barrier.wait()
        return store.add_candidates(order)

    with ThreadPoolExecutor(threads) as pool:
        stored = list(pool.map(client, range(threads)))
    assert sum(stored) == len(wanted)
    assert len(store.candidates()) == len(wanted)


def test_many_open_a_new_store_at_once(url: str, candidate: MakeCandidate) -> None:
    threads = 8
    barrier = threading.Barrier(threads)

    def client(index: int) -> int:
        barrier.wait()
        with FeedbackStore(url) as store:
            return store.add_candidates([candidate(index)])

    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(client, range(threads))) == [1] * threads


def test_unknown_image(store: FeedbackStore, candidate: MakeCandidate, judgement: MakeJudgement) -> None:
    store.add_candidates([candidate(1)])
    with pytest.raises(FeedbackError, match=r"2 unknown image\(s\): '0{63}7', '0{63}8'; add the candidates"):
        store.submit([judgement(1), judgement(8), judgement(7)])
    assert store.judgements() == []
    assert store.submit([judgement(1)]) == 1


def test_judgement_for_a_prompt_that_the_image_was_not_made_for(
    store: FeedbackStore, candidate: MakeCandidate, judgement: MakeJudgement
) -> None:
    store.add_candidates([candidate(1)])
    with pytest.raises(FeedbackError, match=r"it was not made for: \('0{63}1', 'blue star'\)"):
        store.submit([judgement(1), judgement(1, prompt="blue star")])
    assert store.judgements() == []


@pytest.mark.parametrize("verdict", ["Good", "", "perfect", None])
def test_bad_verdict(
    sqlite_store: FeedbackStore, candidate: MakeCandidate, judgement: MakeJudgement, verdict: str
) -> None:
    sqlite_store.add_candidates([candidate(1)])
    with pytest.raises(FeedbackError, match=r"judgement 'k'.*verdict"):
        sqlite_store.submit([judgement(1), judgement(1, verdict, "bob", key="k")])
    assert sqlite_store.judgements() == []


@pytest.mark.parametrize("field", ["idempotency_key", "image", "prompt", "rater"])
@pytest.mark.parametrize("value", ["", " ", "x" * 2001, "a\x00b", "\ud800", 7])
def test_judgement_with_a_field_that_cannot_be_stored(
    sqlite_store: FeedbackStore, candidate: MakeCandidate, field: str, value: str
) -> None:
    sqlite_store.add_candidates([candidate(1)])
    fields = {"idempotency_key": "k", "image": f"{1:064x}", "prompt": "red star", "rater": "ann"}
    with pytest.raises(FeedbackError, match=f"judgement .*: {field}|unknown image"):
        sqlite_store.submit([Judgement(**{**fields, field: value}, verdict="good")])
    assert sqlite_store.judgements() == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", "", "prompt is empty"),
        ("prompt", "  ", "prompt is empty"),
        ("prompt", None, "prompt is None; expected text"),
        ("prompt", "ü" * 1001, "prompt has 2002 bytes; at most 2000 fit"),
        ("image", "", "image is empty"),
        ("category", "", "category is empty"),
        ("split", "", "split is empty"),
        ("seed", -1, "seed is -1; expected an integer from 0 to"),
        ("seed", 2**63, "seed is 9223372036854775808; expected"),
        ("seed", 1.5, "seed is 1.5; expected an integer"),
        ("width", 0, "width is 0; expected an integer from 1"),
        ("height", True, "height is True; expected an integer"),
    ],
)
def test_candidate_with_a_field_that_cannot_be_stored(
    sqlite_store: FeedbackStore, candidate: MakeCandidate, field: str, value: object, message: str
) -> None:
    fields: dict[str, object] = {
        "image": "a" * 64,
        "prompt": "red star",
        "category": "colour",
        "split": "seen",
        "seed": 0,
        "width": 64,
        "height": 64,
    }
    with pytest.raises(FeedbackError, match=message):
        sqlite_store.add_candidates([candidate(1), Candidate(**{**fields, field: value})])  # type: ignore[arg-type]
    assert sqlite_store.candidates() == []


def test_candidate_that_contradicts_the_stored_one(store: FeedbackStore, candidate: MakeCandidate) -> None:
    store.add_candidates([candidate(1)])
    with pytest.raises(FeedbackError, match="has the category 'count', but was given before with 'colour'"):
        store.add_candidates([candidate(2), candidate(1, category="count")])
    larger = Candidate(f"{1:064x}", "star", "colour", "seen", 1, 128, 64)
    with pytest.raises(FeedbackError, match="said to have 128 x 64 pixels, but before it had 64 x 64"):
        store.add_candidates([candidate(2), larger])
    assert store.candidates() == [candidate(1)]


def test_pending(store: FeedbackStore, candidate: MakeCandidate, judgement: MakeJudgement) -> None:
    store.add_candidates([candidate(3), candidate(1), candidate(2), candidate(1, "star")])
    store.submit([judgement(1), judgement(1, "skip", "bob"), judgement(2, "bad")])
    assert store.pending(0) == []
    assert store.pending(1) == [candidate(1, "star"), candidate(3)]
    assert store.pending(2) == [candidate(1, "star"), candidate(2), candidate(3)]
    assert len(store.pending(3)) == 4


def test_distribution(store: FeedbackStore, candidate: MakeCandidate, judgement: MakeJudgement) -> None:
    store.add_candidates([candidate(1), candidate(2), candidate(3, "two stars", "count")])
    store.submit([judgement(1), judgement(1, "bad", "bob"), judgement(2), judgement(2, "skip", "bob")])
    store.submit([judgement(3, "bad", prompt="two stars")])
    assert store.distribution() == {
        "colour": {"candidates": 2, "judgements": 4, "good": 0.5, "bad": 0.25, "skip": 0.25},
        "count": {"candidates": 1, "judgements": 1, "good": 0.0, "bad": 1.0, "skip": 0.0},
        "total": {"candidates": 3, "judgements": 5, "good": 0.4, "bad": 0.4, "skip": 0.2},
    }
