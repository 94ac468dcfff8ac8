"""The store's records and tables. Judgements are events: they are added, and never changed or removed."""

import dataclasses

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

from accord.errors import FeedbackError

VERDICTS = ("good", "bad", "skip")

# In bytes of UTF-8. An index entry of PostgreSQL holds 2,700 bytes, and (image, prompt) is one.
_MAX_BYTES = {
    "image": 64,
    "prompt": 2000,
    "category": 64,
    "split": 64,
    "source": 64,
    "idempotency_key": 200,
    "rater": 200,
    "title": 400,
    "reason": 2000,
    "image_id": 200,
    "model": 200,
}
_MAX_INTEGER = {"seed": 2**63 - 1, "width": 2**31 - 1, "height": 2**31 - 1}
_MIN_INTEGER = {"seed": 0, "width": 1, "height": 1}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An image made for a prompt, to be judged.

    `image` is the digest of its PNG, `source` that of the artifact that made it ("" when unknown), `width`
    and `height` are in pixels, and `seed` is the one it was sampled with.
    """

    image: str
    prompt: str
    category: str
    split: str
    seed: int
    width: int
    height: int
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One rater's verdict ("good", "bad" or "skip") of one candidate.

    `idempotency_key` is the client's name of this judgement: sent again under the same key, it counts once.
    """

    idempotency_key: str
    image: str
    prompt: str
    rater: str
    verdict: str


def check_candidate(candidate: Candidate) -> None:
    """Raises FeedbackError when a field cannot be stored."""
    _check_fields(candidate, f"candidate {candidate.image!r}", optional=("source",))


def check_judgement(judgement: Judgement) -> None:
    """Raises FeedbackError when a field cannot be stored, or the verdict is none of `VERDICTS`."""
    name = f"judgement {judgement.idempotency_key!r}"
    _check_fields(judgement, name, optional=())
    if judgement.verdict not in VERDICTS:
        raise FeedbackError(f"{name}: unknown verdict {judgement.verdict!r}; expected {', '.join(VERDICTS)}")


def _check_fields(record: Candidate | Judgement, name: str, optional: tuple[str, ...]) -> None:
    for field, value in dataclasses.asdict(record).items():
        if field in _MAX_INTEGER:
            _check_integer(name, field, value)
        else:
            check_text(name, field, value, required=field not in optional)


def _check_integer(name: str, field: str, value: object) -> None:
    low, high = _MIN_INTEGER[field], _MAX_INTEGER[field]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise FeedbackError(f"{name}: {field} is {value!r}; expected an integer from {low} to {high}")


def check_text(name: str, field: str, value: object, *, required: bool = True) -> None:
    """Raises FeedbackError when `value` is no text that fits the field."""
    if not isinstance(value, str):
        raise FeedbackError(f"{name}: {field} is {value!r}; expected text")
    if required and not value.strip():
        raise FeedbackError(f"{name}: {field} is empty")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise FeedbackError(f"{name}: {field} is not valid Unicode (a lone surrogate)") from None
    limit = _MAX_BYTES.get(field, size)
    if size > limit:
        raise FeedbackError(f"{name}: {field} has {size} bytes; at most {limit} fit")
    if "\x00" in value:
        raise FeedbackError(f"{name}: {field} holds a NUL character, which databases refuse")


metadata = MetaData(
    naming_convention={  # names that do not depend on the database, so that migrations can refer to them
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only when the key's type is spelled INTEGER.
id_type = BigInteger().with_variant(Integer(), "sqlite")

images = Table(
    "images",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
)

candidates = Table(
    "candidates",
    metadata,
    Column("id", id_type, primary_key=True),
    Column("image", ForeignKey("images.digest"), nullable=False),
    Column("prompt", String(2000), nullable=False),
    Column("category", String(64), nullable=False),
    Column("split", String(64), nullable=False),
    Column("source", String(64), nullable=False),
    Column("seed", BigInteger, nullable=False),
    UniqueConstraint("image", "prompt"),
)

judgements = Table(
    "judgements",
    metadata,
    Column("id", id_type, primary_key=True),
    Column("idempotency_key", String(200), nullable=False, unique=True),
    Column("image", String(64), nullable=False),
    Column("prompt", String(2000), nullable=False),
    Column("rater", String(200), nullable=False),
    Column("verdict", String(4), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    # The campaign's answer that it is part of. No foreign key: SQLite cannot add one later.
    Column("answer_id", BigInteger, index=True),
    ForeignKeyConstraint(["image", "prompt"], ["candidates.image", "candidates.prompt"]),
    CheckConstraint("verdict IN ('good', 'bad', 'skip')", name="verdict"),
    Index(None, "image", "prompt"),
)
