import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect

import accord.feedback.campaign_tables  # noqa: F401
from accord.errors import FeedbackError
from accord.feedback import Campaigns, FeedbackStore, Judgement
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


def test_a_newer_store(url: str) -> None:
    database = Database(url)
    with database.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    with pytest.raises(
        FeedbackError, match="schema version '9999', which this version of Accord does not know"
    ):
        FeedbackStore(url)
