"""What people say of images: the store of judgements, their aggregation, and immutable snapshots of them."""

from accord.feedback.store import FeedbackStore
from accord.feedback.tables import VERDICTS, Candidate, Judgement

__all__ = ["VERDICTS", "Candidate", "FeedbackStore", "Judgement"]
