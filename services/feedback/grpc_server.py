"""The gRPC server of protos/accord/v1/feedback.proto, for programs that rate, and for operators' programs."""

from __future__ import annotations

import asyncio
import datetime
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from accord.errors import ConfigError, ImageError
from accord.tokens import Principal
from accord.v1 import feedback_pb2 as pb
from accord.v1 import feedback_pb2_grpc
from services.feedback.backend import Backend
from services.feedback.campaign_requests import make_campaign
from services.feedback.config import FeedbackServiceConfig
from services.feedback.conversions import (
    answer_of,
    campaign_message,
    judgement_message,
    preference_message,
    task_message,
    verdict_of,
)
from services.feedback.problems import Problem, explain
from services.feedback.signing import NAME, RequestError

DOMAIN = "accord"
SERVICE = pb.DESCRIPTOR.services_by_name["FeedbackService"].full_name

_MAX_REQUEST_BYTES = 32 << 20  # the gateway sends whole images
_DEFAULT_PAGE, _MAX_PAGE = 100, 1000
_EXPORT_PAGE = 500
_KEY = re.compile(r"[A-Za-z0-9-]{8,64}")
_TRAILER = "grpc-status-details-bin"

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class FeedbackServicer(feedback_pb2_grpc.FeedbackServiceServicer):
    """Every method authorises, does its work in a thread, and turns errors into a status with details."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def CreateCampaign(self, request: pb.CreateCampaignRequest, context: Any) -> Any:  # noqa: N802
        return await self._unary(context, "feedback", self._create_campaign, request)

    async def ListCampaigns(self, request: pb.ListCampaignsRequest, context: Any) -> Any:  # noqa: N802
        return await self._unary(context, "feedback", self._list_campaigns, request)

    async def CountPreferences(self, request: pb.CountPreferencesRequest, context: Any) -> Any:  # noqa: N802
        return await self._unary(context, "feedback", self._count_preferences, request)

    async def LeaseTask(self, request: pb.LeaseTaskRequest, context: Any) -> Any:  # noqa: N802
        return await self._unary(context, "rate", self._lease_task, request)

    async def SubmitAnswer(self, request: pb.SubmitAnswerRequest, context: Any) -> Any:  # noqa: N802
        return await self._unary(context, "rate", self._submit_answer, request)

    async def UndoAnswer(self, request: pb.UndoAnswerRequest, context: Any) -> Any:  # noqa: N802
        return await self._unary(context, "rate", self._undo_answer, request)

    async def RecordServedImage(self, request: pb.RecordServedImageRequest, context: Any) -> Any:  # noqa: N802
        return await self._unary(context, "feedback", self._record_served_image, request)

    async def CountServedVerdicts(  # noqa: N802
        self, request: pb.CountServedVerdictsRequest, context: Any
    ) -> Any:
        return await self._unary(context, "feedback", self._count_served_verdicts, request)

    async def RateServedImage(self, request: pb.RateServedImageRequest, context: Any) -> Any:  # noqa: N802
        return await self._unary(context, "rate", self._rate_served_image, request)

    async def ListJudgements(self, request: pb.ListJudgementsRequest, context: Any) -> Any:  # noqa: N802
        return await self._unary(context, "feedback", self._list_judgements, request)

    async def ExportJudgements(  # noqa: N802
        self, request: pb.ExportJudgementsRequest, context: Any
    ) -> AsyncIterator[pb.ExportJudgementsResponse]:
        await self._authorise(context, "feedback")
        campaign, after = request.campaign_id or None, 0
        while True:
            try:
                page = await asyncio.to_thread(
                    self._backend.campaigns.judgements, campaign, after=after, limit=_EXPORT_PAGE
                )
            except Exception as error:
                await self._abort(context, explain(error))
            if not page:
                return
            yield pb.ExportJudgementsResponse(judgements=[judgement_message(row) for row in page])
            after = page[-1].judgement_id

    def _create_campaign(
        self, request: pb.CreateCampaignRequest, principal: Principal
    ) -> pb.CreateCampaignResponse:
        campaign = make_campaign(self._backend.campaigns, request)
        return pb.CreateCampaignResponse(campaign=campaign_message(campaign))

    def _list_campaigns(
        self, request: pb.ListCampaignsRequest, principal: Principal
    ) -> pb.ListCampaignsResponse:
        size, start = _page_size(request.page_size), self._page_start("campaigns", "", request.page_token)
        campaigns = self._backend.campaigns.campaigns()  # oldest first, and never fewer than before
        page, more = campaigns[start : start + size], len(campaigns) > start + size
        token = self._backend.signer.write_page("campaigns", "", start + size) if more else ""
        return pb.ListCampaignsResponse(
            campaigns=[campaign_message(campaign) for campaign in page], next_page_token=token
        )

    def _count_preferences(
        self, request: pb.CountPreferencesRequest, principal: Principal
    ) -> pb.CountPreferencesResponse:
        counts = self._backend.campaigns.preferences(request.campaign_id)
        return pb.CountPreferencesResponse(counts=[preference_message(row) for row in counts])

    def _lease_task(self, request: pb.LeaseTaskRequest, principal: Principal) -> pb.LeaseTaskResponse:
        task = self._backend.lease(request.campaign_id, _own_rater(principal, request.rater))
        if task is None:
            return pb.LeaseTaskResponse()
        read = self._backend.images.get if request.include_images else None
        return pb.LeaseTaskResponse(task=task_message(task, read))

    def _submit_answer(
        self, request: pb.SubmitAnswerRequest, principal: Principal
    ) -> pb.SubmitAnswerResponse:
        rater, key = _own_rater(principal, request.rater), _key(request.idempotency_key)
        counted = self._backend.submit(request.task_id, rater, answer_of(request), key)
        return pb.SubmitAnswerResponse(counted=counted)

    def _undo_answer(self, request: pb.UndoAnswerRequest, principal: Principal) -> pb.UndoAnswerResponse:
        rater, key = _own_rater(principal, request.rater), _key(request.idempotency_key)
        return pb.UndoAnswerResponse(task_id=self._backend.undo(request.campaign_id, rater, key) or "")

    def _record_served_image(
        self, request: pb.RecordServedImageRequest, principal: Principal
    ) -> pb.RecordServedImageResponse:
        try:
            recorded = self._backend.record_served(
                request.image_id, request.image, request.prompt, request.model_digest, request.seed
            )
        except ImageError as error:
            raise RequestError(f"image: {error}") from None
        return pb.RecordServedImageResponse(recorded=recorded)

    def _count_served_verdicts(
        self, request: pb.CountServedVerdictsRequest, principal: Principal
    ) -> pb.CountServedVerdictsResponse:
        since = request.since.ToDatetime(datetime.UTC) if request.HasField("since") else None
        found = self._backend.served.verdicts(since)
        return pb.CountServedVerdictsResponse(
            models=[
                pb.ServedVerdicts(model_digest=model, **counts) for model, counts in sorted(found.items())
            ]
        )

    def _rate_served_image(
        self, request: pb.RateServedImageRequest, principal: Principal
    ) -> pb.RateServedImageResponse:
        _key(request.idempotency_key)
        rater = _own_rater(principal, request.rater)
        counted = self._backend.rate_served(request.image_id, rater, verdict_of(request.verdict))
        return pb.RateServedImageResponse(counted=counted)

    def _list_judgements(
        self, request: pb.ListJudgementsRequest, principal: Principal
    ) -> pb.ListJudgementsResponse:
        size = _page_size(request.page_size)
        after = self._page_start("judgements", request.campaign_id, request.page_token)
        rows = self._backend.campaigns.judgements(request.campaign_id or None, after=after, limit=size + 1)
        token = ""
        if len(rows) > size:
            last = rows[size - 1].judgement_id
            token = self._backend.signer.write_page("judgements", request.campaign_id, last)
        return pb.ListJudgementsResponse(
            judgements=[judgement_message(row) for row in rows[:size]], next_page_token=token
        )

    def _page_start(self, what: str, of: str, token: str) -> int:
        return self._backend.signer.read_page(what, of, token) if token else 0

    async def _unary(
        self,
        context: grpc.aio.ServicerContext,
        scope: str,
        work: Callable[[RequestT, Principal], ResponseT],
        request: RequestT,
    ) -> ResponseT:
        principal = await self._authorise(context, scope)
        try:
            return await asyncio.to_thread(work, request, principal)
        except Exception as error:
            await self._abort(context, explain(error))
            raise  # abort has raised: never reached

    async def _authorise(self, context: grpc.aio.ServicerContext, scope: str) -> Principal:
        """The owner of the call's bearer token, when it has the scope."""
        metadata = dict(context.invocation_metadata() or ())
        kind, _, token = str(metadata.get("authorization", "")).partition(" ")
        principal = self._backend.authenticate(token.strip()) if kind.lower() == "bearer" else None
        if principal is None:
            message = "expected the metadata `authorization: Bearer TOKEN` with a token of this service"
            await self._abort(
                context, Problem(401, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID", message)
            )
        assert principal is not None
        if scope not in principal.scopes:
            message = f"the token {principal.name!r} lacks the scope {scope!r}"
            await self._abort(
                context, Problem(403, grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING", message)
            )
        return principal

    async def _abort(self, context: grpc.aio.ServicerContext, problem: Problem) -> None:
        """Ends the call with the problem, as google.rpc.Status with ErrorInfo."""
        self._backend.metrics.refusals.labels(problem.reason).inc()
        info = any_pb2.Any()
        info.Pack(error_details_pb2.ErrorInfo(reason=problem.reason, domain=DOMAIN))
        code: int = problem.code.value[0]
        assert code in code_pb2.Code.values()
        status = status_pb2.Status(code=code, message=problem.message, details=[info])
        await context.abort(problem.code, problem.message, ((_TRAILER, status.SerializeToString()),))


class GrpcServer:
    """The running server: FeedbackService, health and reflection."""

    def __init__(self, backend: Backend) -> None:
        """Take the config's gRPC port.

        Raises:
            ConfigError: the port is taken, or the TLS files cannot be used.
        """
        self._server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", _MAX_REQUEST_BYTES), ("grpc.so_reuseport", 0)]
        )
        self._health = health.aio.HealthServicer()
        feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(FeedbackServicer(backend), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = _bind(self._server, backend.config)

    async def start(self) -> None:
        """Serve."""
        await self._server.start()
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """Say that it is ending, take nothing new, and let calls under way end within `grace_s` seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _bind(server: grpc.aio.Server, config: FeedbackServiceConfig) -> int:
    address = f"{config.host}:{config.grpc_port}"
    try:
        if config.certificate is None or config.private_key is None:
            port: int = server.add_insecure_port(address)
        else:
            pair = (config.private_key.read_bytes(), config.certificate.read_bytes())
            port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except OSError as error:
        raise ConfigError(f"cannot read the TLS files of the gRPC port: {error}") from None
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(
            f"cannot listen for gRPC on {address}: the port is taken, or the TLS files are no PEM. Stop the "
            "program that has the port, or choose another (grpc_port)"
        )
    return port


def _own_rater(principal: Principal, rater: str) -> str:
    """The rater within the token's name space: nobody speaks for those of another token or of a link."""
    if not NAME.fullmatch(rater):
        raise RequestError(f"{rater!r:.80} is no name of a rater; expected 1 to 64 letters, digits, - and _")
    return f"{principal.name}/{rater}"


def _key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise RequestError("idempotency_key: expected 8 to 64 letters, digits and -, unique to this answer")
    return key


def _page_size(size: int) -> int:
    if size > _MAX_PAGE:
        raise RequestError(f"page_size is {size}; expected at most {_MAX_PAGE}")
    return size or _DEFAULT_PAGE
