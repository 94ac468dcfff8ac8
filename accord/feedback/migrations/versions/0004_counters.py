"""Numbers that were counted when they were asked for are kept: of campaigns and of each of their raters."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_ADDED = {"campaigns": ("num_tasks", "num_gold", "num_wanted"), "campaign_raters": ("answered", "counted")}

_CAMPAIGNS = """
UPDATE campaigns SET
  num_tasks = (SELECT count(*) FROM tasks WHERE tasks.campaign = campaigns.number),
  num_gold = (SELECT count(*) FROM tasks WHERE tasks.campaign = campaigns.number AND gold IS NOT NULL),
  num_wanted = (SELECT coalesce(sum(wanted), 0) FROM tasks WHERE tasks.campaign = campaigns.number)
"""
_ANSWERED = """
UPDATE campaign_raters SET answered = (
  SELECT count(*) FROM answers a
  WHERE a.campaign = campaign_raters.campaign AND a.rater = campaign_raters.rater AND a.kind = 'answer'
    AND NOT EXISTS (SELECT 1 FROM answers u WHERE u.undoes = a.id)
)
"""
_COUNTED = """
UPDATE campaign_raters SET counted = (
  SELECT count(*) FROM places p JOIN tasks t ON p.task = t.id
  WHERE t.campaign = campaign_raters.campaign AND p.rater = campaign_raters.rater AND p.state = 'answered'
    AND t.gold IS NULL
)
"""


def upgrade() -> None:
    for table, columns in _ADDED.items():
        for name in columns:
            op.add_column(table, sa.Column(name, sa.Integer, nullable=False, server_default="0"))
    for statement in (_CAMPAIGNS, _ANSWERED, _COUNTED):
        op.execute(statement)
    op.drop_index("ix_places_expiring", "places")
    _index_leases("state = 'leased' AND expires_ms > 0")
    op.create_table(
        "exclusion_events",
        sa.Column("id", _ID, nullable=False),
        sa.Column("rater", sa.String(200), nullable=False),
        sa.Column("kind", sa.String(7), nullable=False),
        sa.Column("reason", sa.String(2000), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_exclusion_events"),
        sa.CheckConstraint("kind IN ('exclude', 'include')", name=op.f("ck_exclusion_events_kind")),
    )
    op.execute(
        "INSERT INTO exclusion_events (rater, kind, reason, created_at) "
        "SELECT rater, 'exclude', reason, created_at FROM exclusions"
    )


def _index_leases(where: str) -> None:
    condition = sa.text(where)
    op.create_index(
        "ix_places_expiring", "places", ["expires_ms"], postgresql_where=condition, sqlite_where=condition
    )


def downgrade() -> None:
    op.drop_table("exclusion_events")
    op.drop_index("ix_places_expiring", "places")
    _index_leases("state = 'leased'")
    for table, columns in _ADDED.items():
        for name in columns:
            op.drop_column(table, name)
