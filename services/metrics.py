"""What Prometheus is told, by ray.util.metrics: base units, few values of each label. Names get the prefix
ray_."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]
_REWARDS = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0]
MODEL_DIGITS = 12
_CANDIDATES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]


class GatewayMetrics:
    """Of a gateway replica. `method` is the rpc's name, `status` the gRPC code's, `reason` of the error
    catalogue; `role` is champion, canary or named, `model` the first digits of a digest."""

    def __init__(self) -> None:
        self.requests = Counter("accord_requests_total", "Requests ended.", tag_keys=("method", "status"))
        self.errors = Counter(
            "accord_errors_total", "Requests that ended with an error.", tag_keys=("method", "reason")
        )
        self.latency = Histogram(
            "accord_request_seconds",
            "From arrival to end of a request.",
            boundaries=_SECONDS,
            tag_keys=("method",),
        )
        self.in_flight = Gauge("accord_requests_in_flight", "Requests being worked on.", tag_keys=("method",))
        self.images = Counter("accord_images_total", "Images returned.")
        self.candidates = Counter("accord_candidates_total", "Candidates drawn and scored.")
        self.per_image = Histogram(
            "accord_candidates_per_image",
            "Candidates drawn for each image returned, of a request.",
            boundaries=_CANDIDATES,
        )
        self.rewards = Histogram(
            "accord_reward", "Rewards of images returned.", boundaries=_REWARDS, tag_keys=("role",)
        )
        self.model_requests = Counter(
            "accord_model_requests_total",
            "Requests that a diffusion model answered (ok) or failed at (error).",
            tag_keys=("role", "model", "outcome"),
        )
        self.model_latency = Histogram(
            "accord_model_request_seconds",
            "Time in which a diffusion model answered a request.",
            boundaries=_SECONDS,
            tag_keys=("role", "model"),
        )
        self.retries = Counter("accord_retries_total", "Calls begun again.", tag_keys=("deployment", "cause"))
        self.cancelled = Counter(
            "accord_cancelled_total", "Requests that the client gave up.", tag_keys=("method",)
        )
        self.expired = Counter("accord_expired_total", "Requests that ran out of time.", tag_keys=("method",))
        self.recorded = Counter(
            "accord_recorded_images_total",
            "Served images sent to the feedback service (sent), not taken by it (failed), or not sent "
            "because too many waited (dropped).",
            tag_keys=("outcome",),
        )

    def count_model(self, role: str, digest: str, seconds: float | None) -> None:
        """A request that a model answered after so many seconds, or (None) failed at."""
        tags = {"role": role, "model": digest[:MODEL_DIGITS]}
        self.model_requests.inc(tags={**tags, "outcome": "error" if seconds is None else "ok"})
        if seconds is not None:
            self.model_latency.observe(seconds, tags=tags)


class EngineMetrics:
    """Of a generation replica, from the engine's own counters."""

    def __init__(self) -> None:
        self.occupancy = Gauge(
            "accord_engine_batch_occupancy_ratio", "Rows used of the rows of full batches."
        )
        self.step = Gauge(
            "accord_engine_step_seconds", "Mean time of a denoising call since the last report."
        )
        self.queue = Gauge(
            "accord_engine_queue_seconds", "Mean time that samples waited since the last report."
        )
        self.in_flight = Gauge("accord_engine_samples_in_flight", "Samples being denoised or decoded.")
        self.queued = Gauge("accord_engine_samples_queued", "Samples waiting.")
        counters = {
            "steps": ("accord_engine_steps_total", "Denoising calls."),
            "sample_steps": ("accord_engine_sample_steps_total", "Denoising steps over all samples."),
            "finished": ("accord_engine_finished_total", "Samples finished."),
            "cancelled": ("accord_engine_cancelled_total", "Samples cancelled."),
            "failed": ("accord_engine_failed_total", "Samples failed."),
            "refused": ("accord_engine_refused_total", "Samples refused because the queue was full."),
            "cache_hits": ("accord_engine_text_cache_hits_total", "Prompts found encoded."),
            "cache_misses": ("accord_engine_text_cache_misses_total", "Prompts encoded."),
        }
        self.counters = {key: Counter(name, text) for key, (name, text) in counters.items()}
        self.load_failures = load_failures()


def load_failures() -> Counter:
    return Counter("accord_model_load_failures_total", "Model tables that could not be loaded.")


class RewardMetrics:
    """Of a reward replica."""

    def __init__(self) -> None:
        self.images = Counter("accord_scored_images_total", "Images scored.")
        self.load_failures = load_failures()
        self.batch = Histogram("accord_score_batch_images", "Images scored together.", boundaries=_CANDIDATES)
        self.seconds = Histogram(
            "accord_score_batch_seconds", "Time of scoring a batch.", boundaries=_SECONDS
        )
