"""The asynchronous client behind the methods of the blocking one, so that each test is run with both."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from accord.client import AsyncClient


class Blocking:
    """An AsyncClient with an event loop of its own."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self._runner = asyncio.Runner()

        async def make() -> AsyncClient:
            return AsyncClient(*arguments, **settings)

        try:
            self.client = self._runner.run(make())
        except BaseException:
            self._runner.close()
            raise

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        return lambda *arguments, **options: self._runner.run(method(*arguments, **options))

    def stream(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        events = self.client.stream(*arguments, **options)
        try:
            while True:
                try:
                    yield self._runner.run(anext(events))  # type: ignore[arg-type]
                except StopAsyncIteration:
                    return
        finally:
            self._runner.run(events.aclose())  # type: ignore[arg-type]

    def close(self) -> None:
        self._runner.run(self.client.close())
        self._runner.close()
