"""Templates, jobs, pools and tokens."""

from __future__ import annotations

from typing import Any

from .. import _calls as calls
from .._decode import decode
from .._models import Mailboxes, NewToken, Pool, Template, TokenInfo, Verdict
from .connection import AsyncConnection
from .jobs import AsyncJob

# Inside of the classes `list` is a method.
TemplateList = list[Template]
PoolList = list[Pool]
TokenList = list[TokenInfo]
JobList = list[AsyncJob[Any]]


class AsyncArea:
    """A part of the client."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection


class AsyncTemplates(AsyncArea):
    """Captured warm sandboxes."""

    async def list(self) -> TemplateList:
        """Those that can be forked."""
        return await self._connection.call(calls.templates())

    async def get(self, tag: str) -> Template:
        """One of them."""
        return await self._connection.call(calls.template(tag))

    async def build(
        self,
        recipe: str,
        tag: str,
        *,
        memory_bytes: int | None = None,
        vcpus: int | None = None,
        engine: str | None = None,
        strict: bool = False,
    ) -> AsyncJob[Template]:
        """Begins to build one; with ``strict`` a finding of its audit is a failure. Needs the scope admin."""
        info = await self._connection.call(calls.build(recipe, tag, memory_bytes, vcpus, engine, strict))
        return AsyncJob(self._connection, info, lambda result: decode(Template, result, "result"))

    async def verify(self, tag: str, *, count: int = 2) -> AsyncJob[Verdict]:
        """Begins to prove that forks of it share nothing: ``count`` of them are compared pairwise and with the template."""
        info = await self._connection.call(calls.verify(tag, count))
        return AsyncJob(self._connection, info, lambda result: decode(Verdict, result, "result"))

    async def mailboxes(self, tag: str) -> Mailboxes:
        """The mailboxes that a fork request can address."""
        return await self._connection.call(calls.mailboxes(tag))

    async def delete(self, tag: str) -> None:
        """Removes it. Forks of it live on. Needs the scope admin."""
        await self._connection.call(calls.delete_template(tag))


class AsyncJobs(AsyncArea):
    """Long work: that goes on, and the last that has ended."""

    async def list(self) -> JobList:
        """All that are known."""
        return [
            AsyncJob(self._connection, info, lambda result: result)
            for info in await self._connection.call(calls.jobs())
        ]

    async def get(self, id: str) -> AsyncJob[Any]:  # noqa: A002 - the daemon's word
        """One of them."""
        return AsyncJob(self._connection, await self._connection.call(calls.job(id)), lambda result: result)


class AsyncPools(AsyncArea):
    """Machines that are kept started; forks take them over."""

    async def list(self) -> PoolList:
        """All."""
        return await self._connection.call(calls.pools())

    async def set(self, tag: str, size: int, *, network: str | None = None) -> PoolList:
        """Keeps ``size`` machines of a template started, 0 for none; gives all pools when they are ready. Needs the scope admin."""
        return await self._connection.call(calls.set_pool(tag, size, network))


class AsyncTokens(AsyncArea):
    """Who may ask the daemon for what. Needs the scope admin."""

    async def list(self) -> TokenList:
        """All, without what makes them tokens."""
        return await self._connection.call(calls.tokens())

    async def create(self, name: str, scope: str, *, expires: int | None = None) -> NewToken:
        """Makes one with the scope ``read``, ``fork`` or ``admin``, good for ``expires`` seconds. It is shown this once."""
        return await self._connection.call(calls.create_token(name, scope, expires))

    async def delete(self, id: str) -> None:  # noqa: A002 - the daemon's word
        """Removes one; it ends at once."""
        await self._connection.call(calls.delete_token(id))
