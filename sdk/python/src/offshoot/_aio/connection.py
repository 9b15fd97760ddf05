"""Requests over HTTP, and what must be sent again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx

from .._address import Address
from .._exchange import Call, Pause, Retry, exchange
from .._sync.connection import transport_errors

T = TypeVar("T")


class AsyncConnection:
    """Connections to one daemon, kept open between calls, of one event loop."""

    def __init__(self, address: Address, timeout: float, retry: Retry) -> None:
        self.address = address
        self.timeout = timeout
        self.retry = retry
        # A transport of our own: no proxy of the environment comes between.
        transport = httpx.AsyncHTTPTransport(
            uds=address.socket, verify=address.trust, limits=httpx.Limits(keepalive_expiry=5)
        )
        self._http = httpx.AsyncClient(
            base_url=address.url, headers=address.headers, transport=transport, trust_env=False
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def call(self, call: Call[T]) -> T:
        """Sends it, again where that is right, and gives what the answer means."""
        response = await self._settle(call)
        return call.parse(response)

    @asynccontextmanager
    async def stream(self, call: Call[httpx.Response], silence: float | None = None) -> AsyncIterator[httpx.Response]:
        """The answer, its body still to be read; ``silence`` is how long nothing may come."""
        response = await self._settle(call, silence)
        try:
            with transport_errors():
                yield response
        finally:
            await response.aclose()

    async def _settle(self, call: Call[T], silence: float | None = None) -> httpx.Response:
        steps = exchange(call, self.retry)
        step = next(steps)
        try:
            while True:
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                    step = next(steps)
                    continue
                try:
                    response = await self._send(step, silence)
                except httpx.TransportError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(response)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]

    async def _send(self, call: Call[T], silence: float | None) -> httpx.Response:
        body = _awaited(call.body) if callable(call.body) else call.body
        timeout = call.timeout(self.timeout)
        if silence is not None:
            timeout.read = silence
        request = self._http.build_request(
            call.method, call.path, params=call.query or None, headers=call.headers, content=body, timeout=timeout
        )
        response = await self._http.send(request, stream=call.streams)
        if call.streams and response.status_code >= 400:
            try:
                await response.aread()
            finally:
                await response.aclose()
        return response


async def _awaited(parts: Callable[[], Iterator[bytes]]) -> AsyncIterator[bytes]:
    """Parts of files, read in threads: disks block."""
    iterator = parts()
    while part := await asyncio.to_thread(next, iterator, b""):
        yield part


async def to_its_end(work: Coroutine[Any, Any, T]) -> tuple[T, bool]:
    """What came of it, and whether this task was cancelled meanwhile: what must not be left in the middle is not."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled and (task.cancelled() or task.exception() is not None):
        raise asyncio.CancelledError
    return task.result(), cancelled
