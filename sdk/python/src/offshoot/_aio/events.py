"""Streams of server-sent events."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from types import TracebackType

import httpx

from .. import _calls as calls
from .._decode import decode
from .._errors import ConnectionFailed, from_problem
from .._exchange import Call
from .._models import Event, LogChunk
from .._sse import Parser, ServerEvent
from .._sync.connection import transport_errors
from .._sync.events import PASSING, SILENCE
from .connection import AsyncConnection


async def server_events(
    connection: AsyncConnection, call: Call[httpx.Response], silence: float = SILENCE
) -> AsyncIterator[ServerEvent]:
    """The events of one answer, until it ends."""
    async with connection.stream(call, silence) as response:
        async for event in _parsed(response):
            yield event


async def _parsed(response: httpx.Response) -> AsyncIterator[ServerEvent]:
    parser = Parser()
    with transport_errors():
        async for data in response.aiter_bytes():
            for event in parser.feed(data):
                yield event


async def log_chunks(connection: AsyncConnection, fork: str, follow: bool) -> AsyncIterator[LogChunk]:
    async for event in server_events(connection, calls.logs(fork, follow)):
        if event.kind == "log":
            data = event.json()
            yield LogChunk(str(data["source"]), base64.b64decode(data["data_base64"]))
        elif event.kind == "end":
            return
        elif event.kind == "error":
            raise from_problem(event.json())
    raise ConnectionFailed("connection_lost", "the logs ended in the middle")


class AsyncEventStream:
    """What happens, as an iterator that comes back by itself when its connection breaks.

    As a context manager it is connected from the start, so that nothing that is done after is missed; else from the first step. An event
    ``missed`` says that some are lost: look at the lists then. It ends only by ``close`` or an error that does not pass.
    """

    def __init__(self, connection: AsyncConnection, after: int | None) -> None:
        self._connection = connection
        self._after = after
        self._open = AsyncExitStack()
        self._events: AsyncIterator[ServerEvent] | None = None
        self._failures = 0
        self._lost = False
        self._closed = False

    async def __aenter__(self) -> AsyncEventStream:
        await self._connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends it."""
        self._closed = True
        await self._disconnect()

    def __aiter__(self) -> AsyncEventStream:
        return self

    async def __anext__(self) -> Event:
        while not self._closed:
            try:
                if self._events is None:
                    await self._connect()
                if self._lost:
                    self._lost = False
                    return Event(0, int(time.time() * 1000), "missed", "", None)
                if self._events is not None:
                    async for found in self._events:
                        self._failures = 0
                        return self._understood(found)
                raise ConnectionFailed("connection_lost", "the daemon ended the stream")
            except PASSING:
                # From now on, without a number to go on from, something may have been missed.
                self._lost = self._lost or self._after is None
                await self._disconnect()
                self._failures += 1
                if self._failures > self._connection.retry.attempts:
                    raise
                await asyncio.sleep(self._connection.retry.pause(self._failures))
        raise StopAsyncIteration

    def _understood(self, found: ServerEvent) -> Event:
        event = decode(Event, found.json(), "event")
        # The number 0 stands for none.
        self._after = event.id or self._after
        return event

    async def _connect(self) -> None:
        response = await self._open.enter_async_context(self._connection.stream(calls.events(self._after), SILENCE))
        self._events = _parsed(response)

    async def _disconnect(self) -> None:
        self._events = None
        await self._open.aclose()
