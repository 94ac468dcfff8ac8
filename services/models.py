"""Models that a replica has loaded: changed live, the new one before the old is dropped, nothing running is
dropped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from accord.artifacts import MANIFEST_NAME, sha256_bytes
from accord.config import resolve_path
from services.config import ModelTable

logger = logging.getLogger("ray.serve")

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """What a gateway is told of a model. Sizes in pixels, of diffusion models only: the multiple that height
    and width must be of, and the size of a request that names none."""

    alias: str
    digest: str
    load_time: float
    multiple: int = 1
    height: int = 0
    width: int = 0


@dataclass(frozen=True)
class Catalogue:
    """The models of a replica by alias, the digests that it can still use, and the default's alias."""

    models: tuple[Loaded, ...]
    digests: frozenset[str]
    default: str

    def find(self, name: str) -> Loaded | None:
        """By alias or digest; empty for the default."""
        wanted = name or self.default
        for model in self.models:
            if model.alias == wanted:
                return model
        return next((model for model in self.models if model.digest == wanted), None)


@dataclass(frozen=True)
class Missing:
    """Instead of a result: the replica has no model of this digest, or has it no longer."""

    digest: str


@dataclass
class _Slot(Generic[T]):
    model: T
    digest: str
    load_time: float
    users: int = 0
    retired: float | None = None


@dataclass
class Shelf(Generic[T]):
    """Loads and drops models as a `ModelTable` says. All methods but the loading run on one event loop."""

    load: Callable[[str], T]
    """Directory -> model; runs in `executor`."""
    digest: Callable[[T], str]
    executor: Executor
    retire_after_s: float
    opened: Callable[[T], None] = lambda model: None
    closed: Callable[[T], None] = lambda model: None
    describe: Callable[[T], dict[str, int]] = lambda model: {}
    _slots: dict[str, _Slot[T]] = field(default_factory=dict)
    _aliases: dict[str, str] = field(default_factory=dict)
    _sources: dict[str, tuple[str, str]] = field(default_factory=dict)
    _default: str = ""
    _task: asyncio.Task[None] | None = None
    _wanted: ModelTable | None = None
    failures: int = 0

    async def apply(self, table: ModelTable) -> None:
        """The first time: returns when all is loaded, or raises. Later: loads beside what is served, and a
        directory that cannot be loaded leaves everything as it was (the log says why)."""
        self._wanted = table
        if not self._aliases:
            await self._change(table)
            return
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._follow())

    async def settled(self) -> None:
        """Waits until what was last applied is loaded, or has failed."""
        while self._task is not None and not self._task.done():
            await asyncio.wait([self._task])

    @contextlib.contextmanager
    def use(self, digest: str) -> Iterator[T | None]:
        """The model of this digest, which stays loaded during the block; None when there is none."""
        slot = self._slots.get(digest)
        if slot is None:
            yield None
            return
        slot.users += 1
        try:
            yield slot.model
        finally:
            slot.users -= 1

    def catalogue(self) -> Catalogue:
        models = []
        for alias, digest in self._aliases.items():
            slot = self._slots[digest]
            models.append(Loaded(alias, digest, slot.load_time, **self.describe(slot.model)))
        return Catalogue(tuple(models), frozenset(self._slots), self._default)

    async def sweep(self) -> None:
        """Drops retired models that nobody uses and whose time has passed."""
        now = time.monotonic()
        for digest, slot in list(self._slots.items()):
            if slot.retired is None or slot.users or now - slot.retired < self.retire_after_s:
                continue
            del self._slots[digest]
            await asyncio.get_running_loop().run_in_executor(self.executor, self.closed, slot.model)
            logger.info("dropped the model %s", digest)

    async def _follow(self) -> None:
        done: ModelTable | None = None
        while self._wanted is not None and self._wanted is not done:
            done = self._wanted
            try:
                await self._change(done)
            except Exception as error:
                self.failures += 1
                logger.error("the models stay as they were: %s", error)

    async def _change(self, table: ModelTable) -> None:
        try:
            await self._load(table)
        finally:  # also of a table that could not be loaded as a whole
            kept = set(self._aliases.values())
            for digest, slot in self._slots.items():
                slot.retired = None if digest in kept else (slot.retired or time.monotonic())

    async def _load(self, table: ModelTable) -> None:
        loop = asyncio.get_running_loop()
        aliases: dict[str, str] = {}
        sources: dict[str, tuple[str, str]] = {}
        for alias, directory in table.models.items():
            source = (directory, await loop.run_in_executor(self.executor, _fingerprint, directory))
            if self._sources.get(alias) == source and self._aliases[alias] in self._slots:
                aliases[alias], sources[alias] = self._aliases[alias], source
                continue
            model = await loop.run_in_executor(self.executor, self.load, directory)
            digest = self.digest(model)
            if digest not in self._slots:
                await loop.run_in_executor(self.executor, self.opened, model)
                self._slots[digest] = _Slot(model, digest, time.time())
                logger.info("loaded the model %s as %s", digest, alias)
            self._slots[digest].retired = None  # or it might be dropped while others are loaded
            aliases[alias], sources[alias] = digest, source
        # No await from here on: a request sees the old table or the new one.
        self._aliases, self._sources, self._default = aliases, sources, table.default


def _fingerprint(directory: str) -> str:
    """Changes when another artifact is put at the same place."""
    manifest = resolve_path(directory) / MANIFEST_NAME
    return sha256_bytes(manifest.read_bytes()) if manifest.is_file() else ""


def as_table(user_config: dict[str, Any]) -> ModelTable:
    """The table that Serve hands over as plain data."""
    return ModelTable.model_validate(user_config)
