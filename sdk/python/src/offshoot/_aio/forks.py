"""Several forks at once."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterable, Sequence
from types import TracebackType

from .._errors import OffshootError
from .._sync.forks import AT_ONCE
from .connection import to_its_end
from .fork import AsyncFork


class AsyncForks(list[AsyncFork]):
    """Forks of one request, in its order. As a context manager all are ended when the block is left, however it is left."""

    def __init__(self, forks: Iterable[AsyncFork] = (), failed: Sequence[tuple[int, OffshootError]] = ()) -> None:
        super().__init__(forks)
        self.failed = list(failed)
        """Those that could not be made, by their place in the request; only after ``all_or_nothing=False``."""

    async def __aenter__(self) -> AsyncForks:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            _, cancelled = await to_its_end(self.kill())
        except OffshootError as failure:
            if kind is None:
                raise
            # What happened in the block counts more.
            warnings.warn(f"a fork could not be ended: {failure}", ResourceWarning, stacklevel=2)
        else:
            if cancelled:
                raise asyncio.CancelledError

    async def kill(self) -> None:
        """Ends all, also those after one that can not be ended, for which it raises then. One that is gone already is no failure."""
        gate = asyncio.Semaphore(AT_ONCE)

        async def end(fork: AsyncFork) -> None:
            async with gate:
                await fork.kill(missing_ok=True)

        for failure in await asyncio.gather(*(end(fork) for fork in self), return_exceptions=True):
            if failure is not None:
                raise failure
