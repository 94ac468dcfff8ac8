from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, select

from accord.errors import FeedbackError
from accord.feedback import Campaign, Campaigns, FeedbackStore, Gold, Judgement, migrations
from accord.feedback.campaign_tables import campaign_raters, exclusion_events
from accord.feedback.database import Database
from accord.feedback.tables import candidates, images, judgements, metadata
from tests.feedback.conftest import make_candidate


def test_migrations_make_the_tables_of_the_code(url: str) -> None:
    database = Database(url)
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        made = inspect(connection)
        for table in metadata.sorted_tables:
            wanted = {str(constraint.name) for constraint in table.constraints}
            found = {made.get_pk_constraint(table.name)["name"]}
            found |= {c["name"] for c in made.get_unique_constraints(table.name)}
            found |= {c["name"] for c in made.get_check_constraints(table.name)}
            found |= {c["name"] for c in made.get_foreign_keys(table.name)}
            assert found - {None} == wanted
    database.close()


def test_a_store_of_the_version_without_migrations(url: str) -> None:
    """Its tables were made by `create_all`: three, and no version."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    digest = f"{1:064x}"
    with engine.begin() as connection:
        for table in (images, candidates):
            table.create(connection)
        old = judgements.to_metadata(type(metadata)(naming_convention=metadata.naming_convention))
        for other in (images, candidates):
            other.to_metadata(old.metadata)
        old._columns.remove(old.c.answer_id)  # type: ignore[attr-defined]
        old.indexes = {index for index in old.indexes if "answer_id" not in str(index.name)}
        old.create(connection)
        connection.exec_driver_sql(f"INSERT INTO images VALUES ('{digest}', 64, 64)")
        connection.exec_driver_sql(
            "INSERT INTO candidates (image, prompt, category, split, source, seed) "
            f"VALUES ('{digest}', 'red star', 'colour', 'seen', '', 1)"
        )
        connection.exec_driver_sql(
            "INSERT INTO judgements (idempotency_key, image, prompt, rater, verdict, created_at) "
            f"VALUES ('k', '{digest}', 'red star', 'ann', 'good', '2026-01-01 00:00:00')"
        )
    engine.dispose()
    with FeedbackStore(url) as store:
        assert store.judgements() == [Judgement("k", digest, "red star", "ann", "good")]
        store.add_candidates([make_candidate(2)])
    with Campaigns(url) as campaigns:
        assert campaigns.create_alignment("c", "Title", judgements_per_item=1).num_tasks == 1
    test_migrations_make_the_tables_of_the_code(url)


def test_counts_of_a_store_in_use_are_counted_once(url: str) -> None:
    """0004 keeps what was counted before: of gold, of what was taken back, of raters who are excluded."""
    known = [Gold(f"{number:064x}", "red star", "good") for number in range(3)]
    with FeedbackStore(url) as store, Campaigns(url) as campaigns:
        store.add_candidates(make_candidate(number) for number in range(12))
        campaigns.create_alignment("g", "Gold", judgements_per_item=3, images_per_task=1, gold=known)
        campaigns.create_alignment("c", "Title", judgements_per_item=2)
        for rater, number in (("ann", 11), ("bob", 7), ("eve", 5)):
            for name in ("g", "c"):
                for _ in range(number):
                    if task := campaigns.lease(name, rater):
                        verdicts = ["good"] * len(task.images)
                        key = f"{rater} {task.task_id}"
                        campaigns.submit(task.task_id, rater, verdicts, idempotency_key=key)
                campaigns.undo(name, rater, idempotency_key=f"undo {rater} {name}")
        campaigns.exclude("eve", "so")
        before = _counts(campaigns)
    assert len(before[1]) == 6
    assert all(sum(row[number] for row in before[1]) for number in (2, 3))
    database = Database(url)
    with database.writing() as connection:
        config = Config()
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        config.attributes["connection"] = connection
        command.downgrade(config, "0003")
    with database.reading() as connection:
        assert "counted" not in {
            column["name"] for column in inspect(connection).get_columns("campaign_raters")
        }
    database.close()
    with Campaigns(url) as campaigns:
        assert _counts(campaigns) == before
        events = select(exclusion_events.c.rater, exclusion_events.c.kind, exclusion_events.c.reason)
        with campaigns._database.reading() as connection:
            assert connection.execute(events).all() == [("eve", "exclude", "so")]
        assert campaigns.include("eve", "no")
    test_migrations_make_the_tables_of_the_code(url)


def _counts(campaigns: Campaigns) -> tuple[list[Campaign], list[tuple[object, ...]]]:
    seats = campaign_raters
    query = select(seats.c.campaign, seats.c.rater, seats.c.answered, seats.c.counted)
    with campaigns._database.reading() as connection:
        rows = connection.execute(query.order_by(seats.c.campaign, seats.c.rater)).all()
    return campaigns.campaigns(), [tuple(row) for row in rows]


def test_a_newer_store(url: str) -> None:
    database = Database(url)
    with database.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    with pytest.raises(
        FeedbackError, match="schema version '9999', which this version of Accord does not know"
    ):
        FeedbackStore(url)
