"""Who is in the engine, and what it has done: each sample is counted in once and out once."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

from accord.diffusion.adapters import Pixels
from accord.diffusion.batching import Sample
from accord.errors import EngineError


@dataclass(frozen=True)
class EngineStats:
    """What the engine has done since it was made, and what it holds now."""

    steps: int = 0
    """UNet calls."""
    sample_steps: int = 0
    """Denoising steps, summed over samples."""
    rows: int = 0
    """Rows of the UNet calls: two for a sample with guidance; without padding."""
    padding: int = 0
    """Rows added to reach a batch size."""
    row_slots: int = 0
    """Rows that as many full batches would have had."""
    step_seconds: float = 0.0
    begun: int = 0
    queue_seconds: float = 0.0
    """Between submit and the first step, summed over the samples that began."""
    decoded: int = 0
    decode_seconds: float = 0.0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    """Submissions that found the queue full."""
    cache_hits: int = 0
    """Prompts found encoded."""
    cache_misses: int = 0
    in_flight: int = 0
    """Samples being denoised or decoded, now."""
    queued: int = 0
    """Samples waiting to begin, now."""

    @property
    def occupancy(self) -> float:
        """Share of full batches' rows that worked for a sample; 0 before the first step."""
        return self.rows / self.row_slots if self.row_slots else 0.0


class Ledger:
    """Safe from any thread. Callbacks of futures run outside of its lock."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        """Also the engine's lock: notified when room appears."""
        self._stats = EngineStats()
        self._outstanding: set[Sample] = set()

    def count(self, **more: float) -> None:
        """Adds to the numbers of `EngineStats`."""
        with self.changed:
            stats: Any = self._stats
            sums: dict[str, Any] = {name: getattr(stats, name) + value for name, value in more.items()}
            self._stats = replace(stats, **sums)

    def stats(self) -> EngineStats:
        with self.changed:
            return self._stats

    @property
    def queued(self) -> int:
        return self._stats.queued

    @property
    def held(self) -> int:
        return self._stats.in_flight

    def enter(self, sample: Sample) -> None:
        """A sample begins to wait."""
        with self.changed:
            self._outstanding.add(sample)
            self.count(queued=1)

    def begin(self, sample: Sample, now_s: float) -> None:
        """A sample waits no longer."""
        with self.changed:
            sample.begun = True
            self.count(queued=-1, in_flight=1, begun=1, queue_seconds=now_s - sample.submitted_s)

    def outstanding(self) -> list[Sample]:
        """Samples that are not resolved, oldest first."""
        with self.changed:
            return sorted(self._outstanding, key=lambda sample: sample.order)

    def resolve(self, sample: Sample, result: Pixels | EngineError) -> None:
        """Ends a sample; the first call wins, and a future that was cancelled stays so."""
        with self.changed:
            if sample not in self._outstanding:
                return
            self._outstanding.discard(sample)
            future = sample.ticket.future
            wanted = future.set_running_or_notify_cancel()
            failed = isinstance(result, EngineError)
            outcome = ("failed" if failed else "finished") if wanted else "cancelled"
            self.count(**{outcome: 1, "in_flight" if sample.begun else "queued": -1})
            self.changed.notify_all()
        if wanted and isinstance(result, EngineError):
            future.set_exception(result)
        elif wanted:
            future.set_result(result)  # type: ignore[arg-type]
