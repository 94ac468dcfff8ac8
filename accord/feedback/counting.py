"""Which judgements count: all but those that were taken back and those of excluded raters."""

from sqlalchemy import ColumnElement, and_, exists

from accord.feedback.campaign_tables import answers, exclusions
from accord.feedback.tables import judgements

_undo = answers.alias("undo")


def counted() -> ColumnElement[bool]:
    """The condition on `judgements`."""
    undone = exists().where(_undo.c.undoes == judgements.c.answer_id)
    excluded = exists().where(exclusions.c.rater == judgements.c.rater)
    return and_(~undone, ~excluded)


def standing() -> ColumnElement[bool]:
    """The condition on `answers`: an answer that was not taken back."""
    undone = exists().where(_undo.c.undoes == answers.c.id)
    return and_(answers.c.kind == "answer", ~undone)
