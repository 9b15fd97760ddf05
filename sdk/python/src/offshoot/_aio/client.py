"""The client for asyncio."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, overload

from .. import _address as address
from .. import _calls as calls
from .._exchange import Retry
from .._given import Child
from .._models import Version
from .._secret import Secret
from .areas import AsyncJobs, AsyncPools, AsyncTemplates, AsyncTokens
from .connection import AsyncConnection
from .events import AsyncEventStream
from .fork import AsyncFork
from .forks import AsyncForks
from .making import Making, every, only

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._given import Given


class AsyncClient:
    """A daemon, for the tasks of one event loop. It may be used as a context manager.

    ``host`` is ``unix:///path``, ``https://host:port`` or ``http://127.0.0.1:port``; without it OFFSHOOT_HOST counts, else the unix socket of this
    user's daemon. ``token``: else OFFSHOOT_TOKEN. ``tls``: a file of certificates to trust instead of the system's, or a context. ``timeout``:
    seconds of silence after which a call is given up, above what it takes by its nature.
    """

    def __init__(
        self,
        host: str | None = None,
        *,
        token: str | Secret | None = None,
        tls: ssl.SSLContext | str | os.PathLike[str] | None = None,
        timeout: float = 60.0,
        retry: Retry | None = None,
    ) -> None:
        self._connection = AsyncConnection(address.find(host, token, tls), timeout, retry or Retry())
        self.templates = AsyncTemplates(self._connection)
        self.jobs = AsyncJobs(self._connection)
        self.pools = AsyncPools(self._connection)
        self.tokens = AsyncTokens(self._connection)

    def __repr__(self) -> str:
        return f"<AsyncClient of {self._connection.address}>"

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes its connections. Forks live on."""
        await self._connection.close()

    @overload
    def fork(
        self, template: str, *, n: None = None, children: None = None, **given: Unpack[Given]
    ) -> Making[AsyncFork]: ...
    @overload
    def fork(
        self, template: str, *, n: int, children: Sequence[Child] | None = None, **given: Unpack[Given]
    ) -> Making[AsyncForks]: ...
    @overload
    def fork(
        self, template: str, *, children: Sequence[Child], n: int | None = None, **given: Unpack[Given]
    ) -> Making[AsyncForks]: ...
    def fork(
        self, template: str, *, n: int | None = None, children: Sequence[Child] | None = None, **given: Unpack[Given]
    ) -> Making[AsyncFork] | Making[AsyncForks]:
        """Makes a fork of a template, or with ``n`` or ``children`` a list of them, when it is awaited. See Given for what they can be given.

        They are there, each with its identity, when this returns. Used with ``async with`` they are ended at the end of the block; else they
        live on, also when this program ends.
        """
        source = {"template": template}
        if n is None and children is None:
            return Making(self._connection, source, n, children, given, only)
        return Making(self._connection, source, n, children, given, every)

    def forking(
        self, template: str, *, n: int | None = None, children: Sequence[Child] | None = None, **given: Unpack[Given]
    ) -> Making[AsyncForks]:
        """The same, but always a list: ``async with client.forking("py", n=3) as forks:``."""
        return Making(self._connection, {"template": template}, n, children, given, every)

    async def forks(
        self,
        *,
        template: str | None = None,
        state: str | None = None,
        labels: Mapping[str, str] | None = None,
        page: int = 100,
    ) -> AsyncIterator[AsyncFork]:
        """All forks that fit, oldest first, asked for in pages. ``state`` is ``running``, ``standby`` or ``dead``."""
        after: str | None = None
        while True:
            found = await self._connection.call(calls.forks(template, state, labels, page, after))
            for summary in found.forks:
                yield AsyncFork(self._connection, summary)
            after = found.next
            if after is None:
                return

    async def get_fork(self, fork: str) -> AsyncFork:
        """A fork by its name, its id, or the beginning of its id (6 digits or more)."""
        info = await self._connection.call(calls.get_fork(fork))
        return AsyncFork(self._connection, info)

    def events(self, *, after: int | None = None) -> AsyncEventStream:
        """What happens in the daemon, whoever causes it; ``after`` is the id of the last event that is known."""
        return AsyncEventStream(self._connection, after)

    async def version(self) -> Version:
        """The daemon's version."""
        return await self._connection.call(calls.version())

    async def metrics(self) -> str:
        """Figures in the OpenMetrics text format."""
        return await self._connection.call(calls.metrics())
