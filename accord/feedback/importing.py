"""Public feedback into the store: files whose columns are stated, not guessed.

What people said is one of three things, as the stated columns have it: a verdict of an image, a preference
between two images, or the rank of an image among its prompt's. Preferences and ranks become comparisons.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from accord.artifacts import sha256_bytes
from accord.config import Config
from accord.errors import FeedbackError, ImageError
from accord.feedback.comparisons import Compared, check_compared, digest_of
from accord.feedback.exchange import ImportReport, Rejected, store_rows
from accord.feedback.import_images import ImageSource
from accord.feedback.rows import FORMATS, Row, read_rows
from accord.feedback.store import FeedbackStore
from accord.feedback.tables import Candidate, Judgement, check_candidate, check_judgement

_BATCH = 500
_PROGRESS_EVERY = 200  # rows

Name = str
"""A column; "image_path.0" is the first of a column of lists, "image.bytes" a field in one of structs."""


class ImportColumns(Config):
    """Which column of a file holds what. Exactly one of verdict, label_0 and rank says what people said."""

    prompt: Name
    rater: Name | None = None
    """Who said it; without it everyone is `default_rater`."""
    default_rater: str = "imported"
    category: Name | None = None

    image: Name | None = None
    """With verdict or rank: the image, as bytes, as a path, or as the digest of one that is there already."""
    verdict: Name | None = None
    good: tuple[str, ...] = ("good", "1", "1.0", "true", "yes")
    """What verdicts mean good, whatever their case."""
    bad: tuple[str, ...] = ("bad", "0", "0.0", "false", "no")
    skip: tuple[str, ...] = ("skip",)

    rank: Name | None = None
    """The image's place among those of its group; 1 is the best. Equal ranks are a tie."""
    group: Name | None = None
    """With rank: what the images that were ranked together have in common, besides prompt and rater."""

    image_0: Name | None = None
    image_1: Name | None = None
    label_0: Name | None = None
    """How much image_0 was preferred: 1, 0, or 0.5 for a tie; with label_1, the larger is preferred."""
    label_1: Name | None = None
    question: Literal["alignment", "fidelity"] = "alignment"
    """With label_0 or rank: what a preference answers: which fits its text, or which looks better."""

    @property
    def kind(self) -> str:
        """One of "verdict", "rank" and "label_0"."""
        return next(name for name in ("verdict", "rank", "label_0") if getattr(self, name) is not None)

    @property
    def stated(self) -> dict[str, Name]:
        """The columns that are stated, by what they hold."""
        names = ("prompt", "rater", "category", "image", "verdict", "rank", "group")
        pairs = ((n, getattr(self, n)) for n in (*names, "image_0", "image_1", "label_0", "label_1"))
        return {name: column for name, column in pairs if column is not None}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [name for name in ("verdict", "rank", "label_0") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"state exactly one of verdict, rank and label_0; stated are {', '.join(kinds) or 'none'}"
            )
        needs = ("image_0", "image_1") if kinds[0] == "label_0" else ("image",)
        lacking = [name for name in needs if getattr(self, name) is None]
        if lacking:
            raise ValueError(f"{kinds[0]} needs the column(s) {', '.join(lacking)}")
        if self.group is not None and kinds[0] != "rank":
            raise ValueError("group says which images were ranked together; it needs rank")
        return self


def import_columns(
    store: FeedbackStore,
    path: str | Path,
    columns: ImportColumns,
    images: ImageSource,
    *,
    kind: str | None = None,
    campaign: str | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[ImportReport, str]:
    """Stores what a file says by `columns`. Rows that cannot be stored are left out and reported.

    Verdicts become judgements of candidates of category "imported" unless there is a column. Preferences and
    ranks become a complete campaign of comparisons. The same file again changes nothing.

    Args:
        campaign: id of the campaign of comparisons; by default made of their content.
        progress: called now and then with the number of rows read.

    Returns:
        What became of the rows, and the id of the campaign ("" when there are no comparisons).

    Raises:
        FeedbackError: the file as a whole cannot be read, or lacks a stated column; or there is a campaign of
            that id with other content.
        StorageError: the disk is full.
    """
    path = Path(path)
    name = kind or path.suffix.removeprefix(".").lower()
    if name not in FORMATS:
        raise FeedbackError(f"unknown format {name!r} of {path}; with columns stated: {', '.join(FORMATS)}")
    rejected: list[Rejected] = []
    rows = _values(path, name, columns, rejected, progress)
    if columns.kind == "verdict":
        return _import_judgements(store, rows, columns, images, rejected), ""
    read = _ranked if columns.kind == "rank" else _preferred
    items = _once(read(rows, columns, images, rejected), rejected)
    found = campaign or f"import-{digest_of(item for _, item in items)[:16]}"
    new = store.add_compared(found, f"Imported: {path.name}", [i for _, i in items]) if items else 0
    return _report(0, new, len(items) - new, rejected), found if items else ""


Values = Mapping[str, Any]


def _values(
    path: Path,
    kind: str,
    columns: ImportColumns,
    rejected: list[Rejected],
    progress: Callable[[int], None],
) -> Iterator[tuple[int, Values]]:
    """The stated values of each row, by what they hold, with its line."""
    stated = columns.stated
    tops = dict.fromkeys(stated.values())
    required = [name for name in tops if "." not in name] if kind != "jsonl" else []
    wanted = {*tops, *(name.split(".")[0] for name in tops)}
    for number, (line, row) in enumerate(read_rows(path, kind, required=required, only=wanted), start=1):
        if number % _PROGRESS_EVERY == 0:
            progress(number)
        if isinstance(row, str):
            rejected.append(Rejected(line, row))
            continue
        values = {what: _find(row, name) for what, name in stated.items()}
        lacking = [stated[what] for what, value in values.items() if value is None and what != "category"]
        if lacking:
            rejected.append(Rejected(line, f"lacks {', '.join(lacking)}"))
        else:
            yield line, values


def _find(row: Row, name: Name) -> Any:
    """The value of a column, or of a part of it; None where there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes) and part.isdigit():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            return None
    return value


def _text(what: str, value: Any) -> str:
    """Identifiers may be numbers."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise FeedbackError(f"{what} is {value!r}; expected text")


def _number(what: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise FeedbackError(f"{what} is {value!r}; expected a number") from None
    if number != number:
        raise FeedbackError(f"{what} is not a number: this row has no label")
    return number


def _said_by(values: Values, columns: ImportColumns) -> tuple[str, str, str]:
    """Prompt, category and rater."""
    category = values.get("category")
    return (
        _text("prompt", values["prompt"]),
        "imported" if category is None else _text("category", category),
        _text("rater", values["rater"]) if "rater" in values else columns.default_rater,
    )


def _preferred(
    rows: Iterator[tuple[int, Values]], columns: ImportColumns, images: ImageSource, rejected: list[Rejected]
) -> Iterator[tuple[int, Compared]]:
    for line, values in rows:
        try:
            prompt, category, rater = _said_by(values, columns)
            label = _number("label_0", values["label_0"])
            other = _number("label_1", values["label_1"]) if "label_1" in values else 1 - label
            answer = "tie" if label == other else "first" if label > other else "second"
            first, second = (images.take(values[name]).digest for name in ("image_0", "image_1"))
            if first == second:
                raise FeedbackError("image_0 and image_1 are the same image")
            item = Compared(prompt, category, columns.question, (first,), (second,), rater, answer)
            check_compared(item)
        except (FeedbackError, ImageError) as error:
            rejected.append(Rejected(line, str(error)))
            continue
        yield line, item


def _ranked(
    rows: Iterator[tuple[int, Values]], columns: ImportColumns, images: ImageSource, rejected: list[Rejected]
) -> Iterator[tuple[int, Compared]]:
    """Every two images that were ranked together, under the line of the later one."""
    groups: dict[tuple[str, ...], list[tuple[int, str, float]]] = defaultdict(list)
    for line, values in rows:
        try:
            prompt, category, rater = _said_by(values, columns)
            rank = _number("rank", values["rank"])
            group = _text("group", values["group"]) if "group" in values else ""
            digest = images.take(values["image"]).digest
            check_compared(Compared(prompt, category, columns.question, (digest,), (digest,), rater, "tie"))
        except (FeedbackError, ImageError) as error:
            rejected.append(Rejected(line, str(error)))
            continue
        groups[prompt, category, rater, group].append((line, digest, rank))
    for (prompt, category, rater, _), ranked in groups.items():
        if len(ranked) == 1:
            rejected.append(Rejected(ranked[0][0], "the only image of its group: nothing to compare it with"))
        for (_, first, a), (line, second, b) in combinations(ranked, 2):
            if first != second:
                answer = "tie" if a == b else "first" if a < b else "second"
                said = ((first,), (second,), rater, answer)
                yield line, Compared(prompt, category, columns.question, *said)


def _once(items: Iterator[tuple[int, Compared]], rejected: list[Rejected]) -> list[tuple[int, Compared]]:
    """A rater has one answer to a comparison, whichever side its images are on: the first that he gave."""
    kept: dict[tuple[Any, ...], tuple[int, Compared]] = {}
    for line, item in items:
        key = (item.prompt, *sorted((item.first, item.second)), item.rater)
        earlier = kept.setdefault(key, (line, item))
        if earlier[0] != line and earlier[1] is not item:
            rejected.append(
                Rejected(line, f"{item.rater!r} compared these images of this prompt before, in {earlier[0]}")
            )
    return list(kept.values())


def _import_judgements(
    store: FeedbackStore,
    rows: Iterator[tuple[int, Values]],
    columns: ImportColumns,
    images: ImageSource,
    rejected: list[Rejected],
) -> ImportReport:
    new_candidates = new_judgements = known = 0
    part: list[tuple[int, Candidate, Judgement]] = []

    def flush() -> None:
        nonlocal new_candidates, new_judgements, known
        added, stored, wrong = store_rows(store, part)
        new_candidates, new_judgements = new_candidates + added, new_judgements + stored
        known += len(part) - stored - len(wrong)
        rejected.extend(wrong)
        part.clear()

    for line, values in rows:
        try:
            part.append((line, *_judged(values, columns, images)))
        except (FeedbackError, ImageError) as error:
            rejected.append(Rejected(line, str(error)))
        if len(part) == _BATCH:
            flush()
    flush()
    return _report(new_candidates, new_judgements, known, rejected)


def _judged(values: Values, columns: ImportColumns, images: ImageSource) -> tuple[Candidate, Judgement]:
    prompt, category, rater = _said_by(values, columns)
    given = str(values["verdict"]).strip().lower()
    meaning = {"good": columns.good, "bad": columns.bad, "skip": columns.skip}
    verdict = next((name for name, texts in meaning.items() if given in map(str.lower, texts)), None)
    if verdict is None:
        known = ", ".join(text for texts in meaning.values() for text in texts)
        raise FeedbackError(f"verdict is {values['verdict']!r}; expected one of {known}")
    image = images.take(values["image"])
    candidate = Candidate(image.digest, prompt, category, "seen", 0, image.width, image.height)
    key = sha256_bytes("\0".join((image.digest, prompt, rater)).encode("utf-8", "surrogatepass"))
    judgement = Judgement(f"import {key}", image.digest, prompt, rater, verdict)
    check_candidate(candidate)
    check_judgement(judgement)
    return candidate, judgement


def _report(candidates: int, new: int, known: int, rejected: list[Rejected]) -> ImportReport:
    ordered = sorted(rejected, key=lambda item: (item.line, item.reason))
    return ImportReport(candidates, new, known, tuple(ordered))
