"""The client that blocks."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, overload

from .. import _address as address
from .. import _calls as calls
from .._exchange import Retry
from .._given import Child
from .._models import Version
from .._secret import Secret
from .areas import Jobs, Pools, Templates, Tokens
from .connection import Connection
from .events import EventStream
from .fork import Fork
from .forks import Forks, make

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._given import Given


class Client:
    """A daemon. It may be used from several threads, and as a context manager.

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
        self._connection = Connection(address.find(host, token, tls), timeout, retry or Retry())
        self.templates = Templates(self._connection)
        self.jobs = Jobs(self._connection)
        self.pools = Pools(self._connection)
        self.tokens = Tokens(self._connection)

    def __repr__(self) -> str:
        return f"<Client of {self._connection.address}>"

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections. Forks live on."""
        self._connection.close()

    @overload
    def fork(self, template: str, *, n: None = None, children: None = None, **given: Unpack[Given]) -> Fork: ...
    @overload
    def fork(
        self, template: str, *, n: int, children: Sequence[Child] | None = None, **given: Unpack[Given]
    ) -> Forks: ...
    @overload
    def fork(
        self, template: str, *, children: Sequence[Child], n: int | None = None, **given: Unpack[Given]
    ) -> Forks: ...
    def fork(
        self, template: str, *, n: int | None = None, children: Sequence[Child] | None = None, **given: Unpack[Given]
    ) -> Fork | Forks:
        """Makes a fork of a template, or with ``n`` or ``children`` a list of them. See Given for what they can be given.

        They are there, each with its identity, when this returns. Used with ``with`` they are ended at the end of the block; else they live on,
        also when this program ends.
        """
        forks = make(self._connection, {"template": template}, n, children, given)
        return forks[0] if n is None and children is None else forks

    def forking(
        self, template: str, *, n: int | None = None, children: Sequence[Child] | None = None, **given: Unpack[Given]
    ) -> Forks:
        """The same, but always a list: ``with client.forking("py", n=3) as forks:``."""
        return make(self._connection, {"template": template}, n, children, given)

    def forks(
        self,
        *,
        template: str | None = None,
        state: str | None = None,
        labels: Mapping[str, str] | None = None,
        page: int = 100,
    ) -> Iterator[Fork]:
        """All forks that fit, oldest first, asked for in pages. ``state`` is ``running``, ``standby`` or ``dead``."""
        after: str | None = None
        while True:
            found = self._connection.call(calls.forks(template, state, labels, page, after))
            yield from (Fork(self._connection, summary) for summary in found.forks)
            after = found.next
            if after is None:
                return

    def get_fork(self, fork: str) -> Fork:
        """A fork by its name, its id, or the beginning of its id (6 digits or more)."""
        return Fork(self._connection, self._connection.call(calls.get_fork(fork)))

    def events(self, *, after: int | None = None) -> EventStream:
        """What happens in the daemon, whoever causes it; ``after`` is the id of the last event that is known."""
        return EventStream(self._connection, after)

    def version(self) -> Version:
        """The daemon's version."""
        return self._connection.call(calls.version())

    def metrics(self) -> str:
        """Figures in the OpenMetrics text format."""
        return self._connection.call(calls.metrics())
