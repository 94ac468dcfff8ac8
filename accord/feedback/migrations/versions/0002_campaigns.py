"""Campaigns, their tasks, places and answers; exclusions of raters; served images."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_INDEXES = (
    ("ix_tasks_open", "tasks", ["campaign", "id"], "taken < wanted"),
    ("ix_tasks_returned", "tasks", ["campaign", "id"], "returned AND taken < wanted"),
    ("ix_tasks_gold", "tasks", ["campaign", "id"], "gold IS NOT NULL"),
    ("ix_places_held", "places", ["rater", "task"], "state = 'leased'"),
    ("ix_places_expiring", "places", ["expires_ms"], "state = 'leased'"),
)


def upgrade() -> None:
    _campaigns()
    _places()
    _answers()
    op.create_table(
        "exclusions",
        sa.Column("rater", sa.String(200), nullable=False),
        sa.Column("reason", sa.String(2000), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("rater", name="pk_exclusions"),
    )
    op.create_table(
        "served_images",
        sa.Column("image_id", sa.String(200), nullable=False),
        sa.Column("image", sa.String(64), nullable=False),
        sa.Column("prompt", sa.String(2000), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("image_id", name="pk_served_images"),
    )
    op.add_column("judgements", sa.Column("answer_id", sa.BigInteger, nullable=True))
    op.create_index("ix_judgements_answer_id", "judgements", ["answer_id"])
    for name, table, columns, where in _INDEXES:
        op.create_index(name, table, columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


def _campaigns() -> None:
    op.create_table(
        "campaigns",
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("campaign_id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(10), nullable=False),
        sa.Column("title", sa.String(400), nullable=False),
        sa.Column("judgements_per_item", sa.Integer, nullable=False),
        sa.Column("lease_s", sa.Float, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("content", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_campaigns"),
        sa.UniqueConstraint("campaign_id", name="uq_campaigns_campaign_id"),
        sa.CheckConstraint("kind IN ('alignment', 'comparison')", name=op.f("ck_campaigns_kind")),
    )
    op.create_table(
        "tasks",
        sa.Column("id", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("campaign", sa.Integer, nullable=False),
        sa.Column("prompt", sa.String(2000), nullable=False),
        sa.Column("category", sa.String(64), nullable=False),
        sa.Column("question", sa.String(10), nullable=False),
        sa.Column("item", sa.Integer, nullable=False),
        sa.Column("images", sa.Text, nullable=False),
        sa.Column("right_images", sa.Text, nullable=False),
        sa.Column("swapped", sa.Boolean, nullable=False),
        sa.Column("gold", sa.Text, nullable=True),
        sa.Column("wanted", sa.Integer, nullable=False),
        sa.Column("taken", sa.Integer, nullable=False),
        sa.Column("answered", sa.Integer, nullable=False),
        sa.Column("returned", sa.Boolean, nullable=False),
        sa.Column("expiries", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tasks"),
        sa.ForeignKeyConstraint(["campaign"], ["campaigns.number"], name="fk_tasks_campaign"),
        sa.CheckConstraint(
            "gold IS NOT NULL OR (0 <= taken AND taken <= wanted)", name=op.f("ck_tasks_taken")
        ),
    )


def _places() -> None:
    op.create_table(
        "places",
        sa.Column("id", _ID, nullable=False),
        sa.Column("task", sa.BigInteger, nullable=False),
        sa.Column("rater", sa.String(200), nullable=False),
        sa.Column("state", sa.String(9), nullable=False),
        sa.Column("slot", sa.Integer, nullable=True),
        sa.Column("leased_ms", sa.BigInteger, nullable=False),
        sa.Column("expires_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_places"),
        sa.ForeignKeyConstraint(["task"], ["tasks.id"], name="fk_places_task"),
        sa.UniqueConstraint("task", "rater", name="uq_places_task_rater"),
        sa.UniqueConstraint("task", "slot", name="uq_places_task_slot"),
        sa.CheckConstraint(
            "state IN ('leased', 'answered', 'expired', 'withdrawn')", name=op.f("ck_places_state")
        ),
    )
    op.create_table(
        "campaign_raters",
        sa.Column("campaign", sa.Integer, nullable=False),
        sa.Column("rater", sa.String(200), nullable=False),
        sa.Column("cursor", sa.BigInteger, nullable=False),
        sa.Column("leases", sa.Integer, nullable=False),
        sa.Column("last_answer_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("campaign", "rater", name="pk_campaign_raters"),
        sa.ForeignKeyConstraint(["campaign"], ["campaigns.number"], name="fk_campaign_raters_campaign"),
    )


def _answers() -> None:
    op.create_table(
        "answers",
        sa.Column("id", _ID, nullable=False),
        sa.Column("idempotency_key", sa.String(200), nullable=False),
        sa.Column("campaign", sa.Integer, nullable=False),
        sa.Column("task", sa.BigInteger, nullable=True),
        sa.Column("rater", sa.String(200), nullable=False),
        sa.Column("kind", sa.String(6), nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("undoes", sa.BigInteger, nullable=True),
        sa.Column("seconds", sa.Float, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_answers"),
        sa.UniqueConstraint("idempotency_key", name="uq_answers_idempotency_key"),
        sa.UniqueConstraint("undoes", name="uq_answers_undoes"),
        sa.ForeignKeyConstraint(["campaign"], ["campaigns.number"], name="fk_answers_campaign"),
        sa.CheckConstraint("kind IN ('answer', 'undo')", name=op.f("ck_answers_kind")),
    )
    op.create_index("ix_answers_campaign_rater_id", "answers", ["campaign", "rater", "id"])


def downgrade() -> None:
    raise NotImplementedError("answers are never removed")
