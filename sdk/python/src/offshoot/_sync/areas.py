"""Templates, jobs, pools and tokens."""

from __future__ import annotations

from typing import Any

from .. import _calls as calls
from .._decode import decode
from .._models import Mailboxes, NewToken, Pool, Template, TokenInfo, Verdict
from .connection import Connection
from .jobs import Job

# Inside of the classes `list` is a method.
TemplateList = list[Template]
PoolList = list[Pool]
TokenList = list[TokenInfo]
JobList = list[Job[Any]]


class Area:
    """A part of the client."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection


class Templates(Area):
    """Captured warm sandboxes."""

    def list(self) -> TemplateList:
        """Those that can be forked."""
        return self._connection.call(calls.templates())

    def get(self, tag: str) -> Template:
        """One of them."""
        return self._connection.call(calls.template(tag))

    def build(
        self,
        recipe: str,
        tag: str,
        *,
        memory_bytes: int | None = None,
        vcpus: int | None = None,
        engine: str | None = None,
        strict: bool = False,
    ) -> Job[Template]:
        """Begins to build one; with ``strict`` a finding of its audit is a failure. Needs the scope admin."""
        info = self._connection.call(calls.build(recipe, tag, memory_bytes, vcpus, engine, strict))
        return Job(self._connection, info, lambda result: decode(Template, result, "result"))

    def verify(self, tag: str, *, count: int = 2) -> Job[Verdict]:
        """Begins to prove that forks of it share nothing: ``count`` of them are compared pairwise and with the template."""
        info = self._connection.call(calls.verify(tag, count))
        return Job(self._connection, info, lambda result: decode(Verdict, result, "result"))

    def mailboxes(self, tag: str) -> Mailboxes:
        """The mailboxes that a fork request can address."""
        return self._connection.call(calls.mailboxes(tag))

    def delete(self, tag: str) -> None:
        """Removes it. Forks of it live on. Needs the scope admin."""
        self._connection.call(calls.delete_template(tag))


class Jobs(Area):
    """Long work: that goes on, and the last that has ended."""

    def list(self) -> JobList:
        """All that are known."""
        return [Job(self._connection, info, lambda result: result) for info in self._connection.call(calls.jobs())]

    def get(self, id: str) -> Job[Any]:  # noqa: A002 - the daemon's word
        """One of them."""
        return Job(self._connection, self._connection.call(calls.job(id)), lambda result: result)


class Pools(Area):
    """Machines that are kept started; forks take them over."""

    def list(self) -> PoolList:
        """All."""
        return self._connection.call(calls.pools())

    def set(self, tag: str, size: int, *, network: str | None = None) -> PoolList:
        """Keeps ``size`` machines of a template started, 0 for none; gives all pools when they are ready. Needs the scope admin."""
        return self._connection.call(calls.set_pool(tag, size, network))


class Tokens(Area):
    """Who may ask the daemon for what. Needs the scope admin."""

    def list(self) -> TokenList:
        """All, without what makes them tokens."""
        return self._connection.call(calls.tokens())

    def create(self, name: str, scope: str, *, expires: int | None = None) -> NewToken:
        """Makes one with the scope ``read``, ``fork`` or ``admin``, good for ``expires`` seconds. It is shown this once."""
        return self._connection.call(calls.create_token(name, scope, expires))

    def delete(self, id: str) -> None:  # noqa: A002 - the daemon's word
        """Removes one; it ends at once."""
        self._connection.call(calls.delete_token(id))
