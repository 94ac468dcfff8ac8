"""Reads how campaigns stand: progress, raters, preferences, pages of judgements."""

import dataclasses
import datetime
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from sqlalchemy import Column, Connection, Row, and_, case, func, literal, select

from accord.feedback.aggregate import shares_of
from accord.feedback.assignment import task_name
from accord.feedback.campaign_records import Campaign, Progress, Rater, StoredJudgement, StuckTask
from accord.feedback.campaign_tables import (
    answers,
    campaign_raters,
    campaigns,
    exclusions,
    places,
    served_images,
    tasks,
)
from accord.feedback.counting import counted, standing
from accord.feedback.quality import Agreement, agreement_by_category, agreement_of, suspected, weigh
from accord.feedback.tables import VERDICTS, candidates, judgements

_STUCK_EXPIRIES = 2
_STUCK_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class PreferenceCount:
    """How many raters preferred which set of one comparison, for one question."""

    item: int
    prompt: str
    category: str
    question: str
    first: int
    second: int
    tie: int


def campaigns_of(connection: Connection, number: int | None = None) -> list[Campaign]:
    """All campaigns, or the one of that number, oldest first. Reads a row a rater, and none a task."""
    answered = func.coalesce(func.sum(campaign_raters.c.counted), 0).label("answers")
    query = (
        select(campaigns, answered)
        .outerjoin(campaign_raters, campaign_raters.c.campaign == campaigns.c.number)
        .group_by(campaigns.c.number)
        .order_by(campaigns.c.number)
    )
    if number is not None:
        query = query.where(campaigns.c.number == number)
    return [
        Campaign(
            campaign_id=row.campaign_id,
            kind=row.kind,
            title=row.title,
            judgements_per_item=row.judgements_per_item,
            lease_s=row.lease_s,
            created_at=aware(row.created_at),
            num_tasks=row.num_tasks,
            num_answers=int(row.answers),
            num_answers_wanted=row.num_wanted,
        )
        for row in connection.execute(query)
    ]


def answered_by(connection: Connection, campaign: Row[Any], rater: str) -> int:
    """How many answers of this rater's were not taken back."""
    mine = and_(campaign_raters.c.campaign == campaign.number, campaign_raters.c.rater == rater)
    return connection.execute(select(campaign_raters.c.answered).where(mine)).scalar() or 0


def aware(moment: datetime.datetime) -> datetime.datetime:
    """SQLite forgets that a time is UTC."""
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def progress(connection: Connection, campaign: Row[Any], now_ms: int, *, by_prompt: bool = True) -> Progress:
    summary = campaigns_of(connection, campaign.number)[0]
    ours = tasks.c.campaign == campaign.number
    plain = and_(ours, tasks.c.gold.is_(None))
    done, leased_out = connection.execute(
        select(func.count().filter(tasks.c.answered >= tasks.c.wanted), func.sum(tasks.c.expiries)).where(
            plain
        )
    ).one()
    leased = connection.execute(
        select(func.count())
        .select_from(places.join(tasks))
        .where(ours, places.c.state == "leased", places.c.expires_ms > now_ms)
    ).scalar_one()
    people = select(func.count()).where(
        campaign_raters.c.campaign == campaign.number, campaign_raters.c.last_answer_ms > 0
    )
    stuck = connection.execute(
        select(tasks.c.id, tasks.c.prompt, tasks.c.expiries)
        .where(plain, tasks.c.answered < tasks.c.wanted, tasks.c.expiries >= _STUCK_EXPIRIES)
        .order_by(tasks.c.expiries.desc(), tasks.c.id)
        .limit(_STUCK_SHOWN)
    ).all()
    tallies = _tallies(connection, campaign, tasks.c.category)
    of_prompts = _tallies(connection, campaign, tasks.c.prompt) if by_prompt else ()
    compares = campaign.kind == "comparison"
    return Progress(
        campaign=summary,
        tasks=campaign.num_tasks - campaign.num_gold,
        tasks_done=done,
        gold_tasks=campaign.num_gold,
        answers=summary.num_answers,
        wanted=summary.num_answers_wanted,
        leased=leased,
        expired=int(leased_out or 0),
        raters=connection.execute(people).scalar_one(),
        stuck=tuple(StuckTask(task_name(campaign.campaign_id, t), p, e) for t, p, e in stuck),
        shares=_shares(tallies),
        shares_by_prompt=_shares(of_prompts),
        preferences=_preference_shares(preferences(connection, campaign)),
        agreement=(
            _agreement_on_comparisons(connection, campaign) if compares else _agreement_on_images(tallies)
        ),
    )


def _tallies(connection: Connection, campaign: Row[Any], by: Column[str]) -> list[tuple[Any, ...]]:
    """Rows of `by` (a column of tasks), good, bad, skip, number: so many images have so many of each verdict.

    Gold apart. The database counts: however large the campaign, little comes back.
    """
    times = {
        verdict: func.sum(case((judgements.c.verdict == verdict, 1), else_=0)).label(verdict)
        for verdict in VERDICTS
    }
    together = judgements.join(answers, judgements.c.answer_id == answers.c.id).join(
        tasks, answers.c.task == tasks.c.id
    )
    item = (
        select(by.label("name"), *times.values())
        .select_from(together)
        .where(answers.c.campaign == campaign.number, tasks.c.gold.is_(None), counted())
        .group_by(by, judgements.c.image, judgements.c.prompt)
        .subquery()
    )
    same = [item.c.name, *(item.c[verdict] for verdict in VERDICTS)]
    query = select(*same, func.count().label("number")).group_by(*same)
    return [tuple(row) for row in connection.execute(query)]


def _shares(tallies: Sequence[tuple[Any, ...]]) -> dict[str, dict[str, float]]:
    """As `shares_by_category`."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    images: Counter[str] = Counter()
    for name, *given, number in tallies:
        for row in (name, "total"):
            votes[row].update({v: int(n) * number for v, n in zip(VERDICTS, given, strict=True)})
            images[row] += number
    order = [*sorted(votes.keys() - {"total"}), *(["total"] if votes else [])]
    return {name: shares_of(votes[name], images[name]) for name in order}


def _agreement_on_images(tallies: Sequence[tuple[Any, ...]]) -> dict[str, Agreement]:
    """By category; skips apart."""
    found: dict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for name, good, bad, _, number in tallies:
        found[name][int(good), int(bad)] += number
    return agreement_of(found)


def _agreement_on_comparisons(connection: Connection, campaign: Row[Any]) -> dict[str, Agreement]:
    """By question."""
    not_excluded = answers.c.rater.not_in(select(exclusions.c.rater))
    query = (
        select(tasks.c.id, tasks.c.question, answers.c.rater, answers.c.answer)
        .join(answers, answers.c.task == tasks.c.id)
        .where(answers.c.campaign == campaign.number, standing(), not_excluded)
    )
    said: dict[int, dict[str, str]] = defaultdict(dict)
    questions: dict[int, str] = {}
    for task, question, rater, answer in connection.execute(query):
        said[task][rater] = json.loads(answer)
        questions[task] = question
    return agreement_by_category(list(said.values()), [questions[task] for task in said])


def preferences(connection: Connection, campaign: Row[Any]) -> list[PreferenceCount]:
    """By comparison and question, sides put right again; only comparisons that someone answered."""
    if campaign.kind != "comparison":
        return []
    not_excluded = answers.c.rater.not_in(select(exclusions.c.rater))
    rows = connection.execute(
        select(tasks, answers.c.answer, func.count().label("number"))
        .join(answers, answers.c.task == tasks.c.id)
        .where(tasks.c.campaign == campaign.number, standing(), not_excluded)
        .group_by(tasks.c.id, answers.c.answer)
        .order_by(tasks.c.item, tasks.c.question)
    ).all()
    counts: dict[tuple[int, str, str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        answer = json.loads(row.answer)
        if answer != "tie":
            answer = "second" if (answer == "left") == row.swapped else "first"
        counts[row.item, row.prompt, row.category, row.question][answer] += row.number
    return [
        PreferenceCount(*key, first=given["first"], second=given["second"], tie=given["tie"])
        for key, given in counts.items()
    ]


def _preference_shares(rows: list[PreferenceCount]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for row in rows:
        sums = total.setdefault(row.question, {"first": 0, "second": 0, "tie": 0})
        sums["first"] += row.first
        sums["second"] += row.second
        sums["tie"] += row.tie
    return total


def judgements_page(
    connection: Connection, number: int | None, after: int, limit: int
) -> list[StoredJudgement]:
    same = and_(judgements.c.image == candidates.c.image, judgements.c.prompt == candidates.c.prompt)
    query = (
        select(
            judgements.c.id,
            func.coalesce(campaigns.c.campaign_id, ""),
            judgements.c.image,
            judgements.c.prompt,
            candidates.c.category,
            candidates.c.split,
            judgements.c.rater,
            judgements.c.verdict,
            judgements.c.created_at,
        )
        .select_from(
            judgements.join(candidates, same)
            .outerjoin(answers, judgements.c.answer_id == answers.c.id)
            .outerjoin(campaigns, answers.c.campaign == campaigns.c.number)
        )
        .where(judgements.c.id > after, counted())
        .order_by(judgements.c.id)
        .limit(limit)
    )
    if number is not None:
        query = query.where(answers.c.campaign == number)
    return [StoredJudgement(*row[:-1], created_at=aware(row[-1])) for row in connection.execute(query)]


def served_verdicts(connection: Connection, since: datetime.datetime | None) -> dict[str, dict[str, int]]:
    """model -> verdict -> count, of the verdicts that clients sent for images that were served to them.

    A token has one voice an image, its first: raters' names below a token's ("token/name") are the client's
    own word, and must not outvote others.
    """
    served = served_images
    query = (
        select(served.c.model, served.c.image_id, judgements.c.rater, judgements.c.verdict)
        .join_from(
            judgements,
            served,
            and_(
                judgements.c.image == served.c.image,
                judgements.c.prompt == served.c.prompt,
                # As `Campaigns.served` and `ServedImages.rate` write it: the same image may be served twice.
                judgements.c.idempotency_key
                == literal("served ").concat(served.c.image_id).concat(" ").concat(judgements.c.rater),
            ),
        )
        .where(counted())
        .order_by(judgements.c.id)
    )
    if since is not None:
        query = query.where(judgements.c.created_at >= since)
    found: dict[str, Counter[str]] = defaultdict(Counter)
    voices: set[tuple[str, str]] = set()
    for model, image_id, rater, verdict in connection.execute(query):
        voice = (image_id, rater.partition("/")[0])
        if voice not in voices:
            voices.add(voice)
            found[model][verdict] += 1
    return {model: dict(verdicts) for model, verdicts in found.items()}


def raters(connection: Connection, campaign: Row[Any]) -> list[Rater]:
    """One row a rater; those who were excluded too."""
    why = {row.rater: row.reason for row in connection.execute(select(exclusions))}
    seconds: dict[str, list[float]] = defaultdict(list)
    given: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    gold: dict[str, Counter[bool]] = defaultdict(Counter)
    truth: dict[tuple[str, str], bool] = {}
    query = (
        select(
            tasks.c.prompt, tasks.c.images, tasks.c.gold, answers.c.rater, answers.c.answer, answers.c.seconds
        )
        .join(tasks, answers.c.task == tasks.c.id)
        .where(answers.c.campaign == campaign.number, standing())
    )
    for prompt, images, known, rater, answer, took_s in connection.execute(query):
        seconds[rater].append(took_s)
        if campaign.kind != "alignment":
            continue
        verdicts = json.loads(answer)
        if known is not None:
            pairs = zip(json.loads(known), verdicts, strict=True)
            gold[rater].update(right == said for right, said in pairs if said != "skip")
            truth.update(
                ((image, prompt), right == "good")
                for image, right in zip(json.loads(images), json.loads(known), strict=True)
            )
        for image, verdict in zip(json.loads(images), verdicts, strict=True):
            if verdict != "skip":
                given[image, prompt][rater] = verdict
    agree = _agreements(given)
    told = {key: item for key, item in given.items() if len(item) > 1 or key in truth}
    judged = Counter(rater for item in told.values() for rater in item)
    reliability = _reliability(told, truth, set(why))
    return [
        Rater(
            rater=name,
            answers=len(seconds[name]),
            gold_judged=gold[name].total(),
            gold_accuracy=_share(gold[name]),
            median_s=statistics.median(seconds[name]),
            agreement=_share(agree[name]),
            reliability=reliability.get(name),
            suspected=suspected(reliability.get(name), judged[name], _share(gold[name]), gold[name].total()),
            excluded=name in why,
            reason=why.get(name, ""),
        )
        for name in sorted(seconds)
    ]


def _agreements(given: dict[tuple[str, str], dict[str, str]]) -> dict[str, Counter[bool]]:
    """How often each rater said of an image what another did, and how often not."""
    agree: dict[str, Counter[bool]] = defaultdict(Counter)
    for votes_of in given.values():
        for rater, verdict in votes_of.items():
            others = [other for name, other in votes_of.items() if name != rater]
            agree[rater].update(other == verdict for other in others)
    return agree


def _reliability(
    given: dict[tuple[str, str], dict[str, str]], truth: dict[tuple[str, str], bool], excluded: set[str]
) -> Mapping[str, float]:
    """Estimated from the votes of those who are not excluded."""
    votes: dict[Hashable, dict[str, bool]] = {
        key: {rater: verdict == "good" for rater, verdict in item.items() if rater not in excluded}
        for key, item in given.items()
    }
    return weigh(votes, dict(truth.items())).reliability


def _share(counts: Counter[bool]) -> float | None:
    return counts[True] / counts.total() if counts.total() else None
