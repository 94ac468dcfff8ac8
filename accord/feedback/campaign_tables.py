"""The tables of campaigns: who is to judge what, who holds what, and what was answered.

Answers are events: they are added, and never changed or removed; taking one back is an event too. Tasks and
places are the state that follows from them, kept so that the next task is found without counting.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from accord.feedback.tables import id_type, metadata

TASKS_PER_CAMPAIGN = 1 << 32
"""A task's id is its campaign's number times this, plus its own number: so ids are in leasing order."""

campaigns = Table(
    "campaigns",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("campaign_id", String(64), nullable=False, unique=True),
    Column("kind", String(10), nullable=False),
    Column("title", String(400), nullable=False),
    Column("judgements_per_item", Integer, nullable=False),
    Column("lease_s", Float, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("content", String(64), nullable=False),  # digest of what it was asked to be
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("num_tasks", Integer, nullable=False),  # gold among them
    Column("num_gold", Integer, nullable=False),
    Column("num_wanted", Integer, nullable=False),  # answers
    CheckConstraint("kind IN ('alignment', 'comparison')", name="kind"),
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("campaign", ForeignKey("campaigns.number"), nullable=False),
    Column("prompt", String(2000), nullable=False),
    Column("category", String(64), nullable=False),
    Column("question", String(10), nullable=False),
    Column("item", Integer, nullable=False),  # of a comparison: which pair; its questions share it
    Column("images", Text, nullable=False),  # JSON: digests; of a comparison, the left side's
    Column("right_images", Text, nullable=False),
    Column("swapped", Boolean, nullable=False),  # of a comparison: the second set is on the left
    Column("gold", Text),  # JSON: the known verdicts; such a task is for everyone, and none of the k
    Column("wanted", Integer, nullable=False),  # places; 0 for gold
    Column("taken", Integer, nullable=False),  # places that are leased or answered
    Column("answered", Integer, nullable=False),
    Column("returned", Boolean, nullable=False),  # a place was given back
    Column("expiries", Integer, nullable=False),  # leases that ran out
    CheckConstraint("gold IS NOT NULL OR (0 <= taken AND taken <= wanted)", name="taken"),
    Index(
        "ix_tasks_open",
        "campaign",
        "id",
        postgresql_where=text("taken < wanted"),
        sqlite_where=text("taken < wanted"),
    ),
    Index(
        "ix_tasks_returned",
        "campaign",
        "id",
        postgresql_where=text("returned AND taken < wanted"),
        sqlite_where=text("returned AND taken < wanted"),
    ),
    Index(
        "ix_tasks_gold",
        "campaign",
        "id",
        postgresql_where=text("gold IS NOT NULL"),
        sqlite_where=text("gold IS NOT NULL"),
    ),
)

places = Table(
    "places",
    metadata,
    Column("id", id_type, primary_key=True),
    Column("task", ForeignKey("tasks.id"), nullable=False),
    Column("rater", String(200), nullable=False),
    Column("state", String(9), nullable=False),
    Column("slot", Integer),  # 0 to k - 1 while it is leased or answered; none in gold tasks
    Column("leased_ms", BigInteger, nullable=False),  # since 1970, as the next
    Column("expires_ms", BigInteger, nullable=False),
    # The two that make "k answers by k different raters" true whatever the code does.
    UniqueConstraint("task", "rater"),
    UniqueConstraint("task", "slot"),
    CheckConstraint("state IN ('leased', 'answered', 'expired', 'withdrawn')", name="state"),
    Index(
        "ix_places_held",
        "rater",
        "task",
        postgresql_where=text("state = 'leased'"),
        sqlite_where=text("state = 'leased'"),
    ),
    Index(
        "ix_places_expiring",
        "expires_ms",
        # "More than 0" is always true, and keeps the planner from reading all leases for those of one rater.
        postgresql_where=text("state = 'leased' AND expires_ms > 0"),
        sqlite_where=text("state = 'leased' AND expires_ms > 0"),
    ),
)

campaign_raters = Table(
    "campaign_raters",
    metadata,
    Column("campaign", ForeignKey("campaigns.number"), primary_key=True),
    Column("rater", String(200), primary_key=True),
    Column("cursor", BigInteger, nullable=False),  # the last task that was leased in order
    Column("leases", Integer, nullable=False),  # how often a new task was leased
    Column("last_answer_ms", BigInteger, nullable=False),
    # Counted as they come: to ask how far a campaign is costs the same however large it is.
    Column("answered", Integer, nullable=False),  # answers that were not taken back, gold among them
    Column("counted", Integer, nullable=False),  # places of his that are answered, gold apart
)

answers = Table(
    "answers",
    metadata,
    Column("id", id_type, primary_key=True),
    Column("idempotency_key", String(200), nullable=False, unique=True),
    Column("campaign", ForeignKey("campaigns.number"), nullable=False),
    Column("task", BigInteger),  # none: an undo that found nothing to take back
    Column("rater", String(200), nullable=False),
    Column("kind", String(6), nullable=False),
    Column("answer", Text, nullable=False),  # JSON
    Column("undoes", BigInteger, unique=True),  # the answer that this undo takes back
    Column("seconds", Float),
    Column("created_at", DateTime(timezone=True), nullable=False),
    CheckConstraint("kind IN ('answer', 'undo')", name="kind"),
    Index(None, "campaign", "rater", "id"),
)

# Who is excluded now. How that came is in `exclusion_events`, of which nothing is ever removed.
exclusions = Table(
    "exclusions",
    metadata,
    Column("rater", String(200), primary_key=True),
    Column("reason", String(2000), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
)

exclusion_events = Table(
    "exclusion_events",
    metadata,
    Column("id", id_type, primary_key=True),
    Column("rater", String(200), nullable=False),
    Column("kind", String(7), nullable=False),
    Column("reason", String(2000), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    CheckConstraint("kind IN ('exclude', 'include')", name="kind"),
)

served_images = Table(
    "served_images",
    metadata,
    Column("image_id", String(200), primary_key=True),
    Column("image", String(64), nullable=False),
    Column("prompt", String(2000), nullable=False),
    Column("model", String(200), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
)

used_invites = Table(
    "used_invites",
    metadata,
    Column("invite", String(64), primary_key=True),  # SHA-256 of the link's nonce
    Column("session", String(64), nullable=False),  # SHA-256 of the id of the session that it opened
    Column("created_at", DateTime(timezone=True), nullable=False),
)
