"""When a failed call is tried again: exponential backoff with full jitter, within the call's deadline.

gRPC's own retries are switched off: Ray Serve answers an error with an empty message first, after which gRPC
holds the call for answered and never tries it again.
"""

import dataclasses
import logging
import random
import time
from collections.abc import Callable

from accord.client.errors import ClientError, Unavailable
from accord.errors import ConfigError

_log = logging.getLogger("accord.client")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how soon. `max_attempts` of 1 means no retry."""

    max_attempts: int = 8
    max_attempts_to_connect: int = 3
    """When nothing ever answered at the address: it is more likely wrong than restarting."""
    initial_backoff_s: float = 0.2
    max_backoff_s: float = 5.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or self.max_attempts_to_connect < 1:
            raise ConfigError("a call has at least one attempt: max_attempts must be 1 or more")
        if not 0 <= self.initial_backoff_s <= self.max_backoff_s or self.multiplier < 1:
            raise ConfigError(
                "expected 0 <= initial_backoff_s <= max_backoff_s, and a multiplier of 1 or more"
            )

    def ceiling_s(self, failures: int) -> float:
        """The longest wait after so many failures, from 1."""
        grown = self.initial_backoff_s * self.multiplier ** min(failures - 1, 64)
        return min(self.max_backoff_s, grown)


class Attempts:
    """The attempts of one call."""

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s is {timeout_s}; expected a positive number of seconds")
        self._policy = policy
        self._clock = clock
        self._uniform = uniform
        self._deadline = clock() + timeout_s
        self.failures = 0

    def again(self) -> "Attempts":
        """The same deadline for one more call, with all its attempts before it."""
        self.failures = 0
        return self

    def remaining_s(self) -> float:
        """Seconds until the deadline, at least a millisecond (gRPC then says that it is too late)."""
        return max(0.001, self._deadline - self._clock())

    def delay_after(self, error: ClientError, *, reached: bool) -> float:
        """Seconds to wait before the next attempt. `reached`: this client has had an answer before.

        Raises:
            ClientError: `error` itself, when trying again is of no use or there is no time for it.
        """
        self.failures += 1
        if not error.retryable:
            raise error
        limit = self._policy.max_attempts
        if isinstance(error, Unavailable) and error.never_connected and not reached:
            limit = min(limit, self._policy.max_attempts_to_connect)
        if self.failures >= limit:
            raise error
        # Full jitter, so that clients refused together do not come back together.
        delay_s = self._uniform(0.0, self._policy.ceiling_s(self.failures))
        if error.retry_after_s is not None:
            delay_s += error.retry_after_s
        if self._clock() + delay_s >= self._deadline:
            raise error
        _log.info("attempt %d failed (%s); again in %.2f s", self.failures, error.code, delay_s)
        return delay_s
