"""Images, candidates and judgements: what Accord 0.1 made without migrations."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "images",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("width", sa.Integer, nullable=False),
        sa.Column("height", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_images"),
    )
    op.create_table(
        "candidates",
        sa.Column("id", _ID, nullable=False),
        sa.Column("image", sa.String(64), nullable=False),
        sa.Column("prompt", sa.String(2000), nullable=False),
        sa.Column("category", sa.String(64), nullable=False),
        sa.Column("split", sa.String(64), nullable=False),
        sa.Column("source", sa.String(64), nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_candidates"),
        sa.ForeignKeyConstraint(["image"], ["images.digest"], name="fk_candidates_image"),
        sa.UniqueConstraint("image", "prompt", name="uq_candidates_image_prompt"),
    )
    op.create_table(
        "judgements",
        sa.Column("id", _ID, nullable=False),
        sa.Column("idempotency_key", sa.String(200), nullable=False),
        sa.Column("image", sa.String(64), nullable=False),
        sa.Column("prompt", sa.String(2000), nullable=False),
        sa.Column("rater", sa.String(200), nullable=False),
        sa.Column("verdict", sa.String(4), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_judgements"),
        sa.UniqueConstraint("idempotency_key", name="uq_judgements_idempotency_key"),
        sa.ForeignKeyConstraint(
            ["image", "prompt"], ["candidates.image", "candidates.prompt"], name="fk_judgements_image_prompt"
        ),
        sa.CheckConstraint("verdict IN ('good', 'bad', 'skip')", name=op.f("ck_judgements_verdict")),
    )
    op.create_index("ix_judgements_image_prompt", "judgements", ["image", "prompt"])


def downgrade() -> None:
    raise NotImplementedError("judgements are never removed")
