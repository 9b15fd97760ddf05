"""Streams of server-sent events."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType

import httpx

from .. import _calls as calls
from .._decode import decode
from .._errors import ConnectionFailed, RateLimited, Unavailable, WaitTimeout, from_problem
from .._exchange import Call
from .._models import Event, LogChunk
from .._sse import Parser, ServerEvent
from .connection import Connection, transport_errors

# The daemon says something every 15 seconds.
SILENCE = 60.0
# What ends by itself once the daemon is there again.
PASSING = (ConnectionFailed, WaitTimeout, Unavailable, RateLimited)


def server_events(
    connection: Connection, call: Call[httpx.Response], silence: float = SILENCE
) -> Iterator[ServerEvent]:
    """The events of one answer, until it ends."""
    with connection.stream(call, silence) as response:
        yield from _parsed(response)


def _parsed(response: httpx.Response) -> Iterator[ServerEvent]:
    parser = Parser()
    for data in response.iter_bytes():
        yield from parser.feed(data)


def log_chunks(connection: Connection, fork: str, follow: bool) -> Iterator[LogChunk]:
    for event in server_events(connection, calls.logs(fork, follow)):
        if event.kind == "log":
            data = event.json()
            yield LogChunk(str(data["source"]), base64.b64decode(data["data_base64"]))
        elif event.kind == "end":
            return
        elif event.kind == "error":
            raise from_problem(event.json())
    raise ConnectionFailed("connection_lost", "the logs ended in the middle")


class EventStream:
    """What happens, as an iterator that comes back by itself when its connection breaks.

    As a context manager it is connected from the start, so that nothing that is done after is missed; else from the first ``next``. An event
    ``missed`` says that some are lost: look at the lists then. It ends only by ``close`` or an error that does not pass.
    """

    def __init__(self, connection: Connection, after: int | None) -> None:
        self._connection = connection
        self._after = after
        self._open = ExitStack()
        self._events: Iterator[ServerEvent] | None = None
        self._failures = 0
        self._lost = False
        self._closed = False

    def __enter__(self) -> EventStream:
        self._connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends it."""
        self._closed = True
        self._disconnect()

    def __iter__(self) -> EventStream:
        return self

    def __next__(self) -> Event:
        while not self._closed:
            try:
                if self._events is None:
                    self._connect()
                if self._lost:
                    self._lost = False
                    return Event(0, int(time.time() * 1000), "missed", "", None)
                for found in self._events or ():
                    self._failures = 0
                    return self._understood(found)
                raise ConnectionFailed("connection_lost", "the daemon ended the stream")
            except PASSING:
                # From now on, without a number to go on from, something may have been missed.
                self._lost = self._lost or self._after is None
                self._disconnect()
                self._failures += 1
                if self._failures > self._connection.retry.attempts:
                    raise
                time.sleep(self._connection.retry.pause(self._failures))
        raise StopIteration

    def _understood(self, found: ServerEvent) -> Event:
        event = decode(Event, found.json(), "event")
        # The number 0 stands for none.
        self._after = event.id or self._after
        return event

    def _connect(self) -> None:
        response = self._open.enter_context(self._connection.stream(calls.events(self._after), SILENCE))
        self._events = _read(response)

    def _disconnect(self) -> None:
        self._events = None
        self._open.close()


def _read(response: httpx.Response) -> Iterator[ServerEvent]:
    with transport_errors():
        yield from _parsed(response)
