"""A campaign as a request describes it."""

from __future__ import annotations

from accord.feedback import Campaign, Campaigns, ComparisonItem, Gold
from accord.v1 import feedback_pb2 as pb
from services.feedback.conversions import verdict_of
from services.feedback.signing import RequestError

_COMPARISON_CATEGORY = "comparison"


def make_campaign(campaigns: Campaigns, request: pb.CreateCampaignRequest) -> Campaign:
    """The campaign that the request asks for; the one that is there, when it was made before.

    Raises:
        RequestError: fields of the other kind, or no kind.
        FeedbackError: what is asked for cannot be made.
    """
    if request.kind == pb.CAMPAIGN_KIND_ALIGNMENT:
        if request.comparisons:
            raise RequestError("comparisons: an alignment campaign has none; kind COMPARISON compares sets")
        return campaigns.create_alignment(
            request.campaign_id,
            request.title,
            judgements_per_item=request.judgements_per_item,
            sources=tuple(request.collections),
            gold=[Gold(item.digest, item.prompt, verdict_of(item.verdict)) for item in request.gold],
        )
    if request.kind == pb.CAMPAIGN_KIND_COMPARISON:
        if request.collections or request.gold:
            raise RequestError(
                "collections, gold: a comparison campaign has none; it names its sets in `comparisons`"
            )
        return campaigns.create_comparison(
            request.campaign_id,
            request.title,
            [_item(comparison) for comparison in request.comparisons],
            judgements_per_item=request.judgements_per_item,
        )
    raise RequestError(f"unknown kind {request.kind}; expected ALIGNMENT or COMPARISON")


def _item(comparison: pb.SetComparison) -> ComparisonItem:
    return ComparisonItem(
        comparison.prompt,
        tuple(comparison.first_digests),
        tuple(comparison.second_digests),
        comparison.category or _COMPARISON_CATEGORY,
    )
