"""What Alembic runs. The connection is the store's own, so that all is done in its transaction or nothing."""

from alembic import context

import accord.feedback.campaign_tables  # noqa: F401 - its tables belong to the metadata
from accord.feedback.tables import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
