"""What people say of images: the store of judgements, campaigns that collect them, their aggregation, and
immutable snapshots of them.
"""

from accord.feedback.campaign_records import (
    AnsweredError,
    Campaign,
    ComparisonItem,
    ExcludedError,
    Gold,
    LeaseError,
    NotFoundError,
    Task,
)
from accord.feedback.campaigns import Campaigns
from accord.feedback.store import FeedbackStore
from accord.feedback.tables import VERDICTS, Candidate, Judgement

__all__ = [
    "VERDICTS",
    "AnsweredError",
    "Campaign",
    "Campaigns",
    "Candidate",
    "ComparisonItem",
    "ExcludedError",
    "FeedbackStore",
    "Gold",
    "Judgement",
    "LeaseError",
    "NotFoundError",
    "Task",
]
