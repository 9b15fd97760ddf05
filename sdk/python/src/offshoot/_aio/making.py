"""Forks that are being made: to be awaited, or used with ``async with``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

from .. import _calls as calls
from .._given import Child
from .connection import AsyncConnection, to_its_end
from .fork import AsyncFork
from .forks import AsyncForks

if TYPE_CHECKING:
    from .._given import Given

T = TypeVar("T", AsyncFork, AsyncForks)


class Making(Generic[T]):
    """``fork = await client.fork("py")``, or ``async with client.fork("py") as fork:``, which ends it when the block is left.

    A task that is cancelled while its forks are made does not leave them behind: they are ended first.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        source: Mapping[str, str],
        n: int | None,
        children: Sequence[Child] | None,
        given: Given,
        shape: Callable[[AsyncForks], T],
    ) -> None:
        self._connection = connection
        self._call = calls.fork(source, n, children, given)
        self._shape: Callable[[AsyncForks], T] = shape
        self._made: T | None = None

    def __await__(self) -> Generator[object, None, T]:
        return self._make().__await__()

    async def __aenter__(self) -> T:
        self._made = await self._make()
        return self._made

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._made is not None:
            await self._made.__aexit__(kind, error, trace)

    async def _make(self) -> T:
        made, cancelled = await to_its_end(self._connection.call(self._call))
        forks = AsyncForks((AsyncFork(self._connection, info) for info in made.forks), made.failed)
        if cancelled:
            await to_its_end(forks.kill())
            raise asyncio.CancelledError
        return self._shape(forks)


def only(forks: AsyncForks) -> AsyncFork:
    """The one fork of a request for one."""
    return forks[0]


def every(forks: AsyncForks) -> AsyncForks:
    """All of them."""
    return forks
