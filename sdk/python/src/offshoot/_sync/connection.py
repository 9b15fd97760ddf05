"""Requests over HTTP, and what must be sent again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx

from .._address import Address
from .._errors import WaitTimeout
from .._exchange import Call, Pause, Retry, connection_lost, exchange

T = TypeVar("T")


class Connection:
    """Connections to one daemon, kept open between calls. It may be used from several threads."""

    def __init__(self, address: Address, timeout: float, retry: Retry) -> None:
        self.address = address
        self.timeout = timeout
        self.retry = retry
        # A transport of our own: no proxy of the environment comes between.
        transport = httpx.HTTPTransport(
            uds=address.socket, verify=address.trust, limits=httpx.Limits(keepalive_expiry=5)
        )
        self._http = httpx.Client(base_url=address.url, headers=address.headers, transport=transport, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def call(self, call: Call[T]) -> T:
        """Sends it, again where that is right, and gives what the answer means."""
        response = self._settle(call)
        return call.parse(response)

    @contextmanager
    def stream(self, call: Call[httpx.Response], silence: float | None = None) -> Iterator[httpx.Response]:
        """The answer, its body still to be read; ``silence`` is how long nothing may come."""
        response = self._settle(call, silence)
        try:
            with transport_errors():
                yield response
        finally:
            response.close()

    def _settle(self, call: Call[T], silence: float | None = None) -> httpx.Response:
        steps = exchange(call, self.retry)
        step = next(steps)
        try:
            while True:
                if isinstance(step, Pause):
                    time.sleep(step.seconds)
                    step = next(steps)
                    continue
                try:
                    response = self._send(step, silence)
                except httpx.TransportError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(response)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]

    def _send(self, call: Call[T], silence: float | None) -> httpx.Response:
        body = call.body() if callable(call.body) else call.body
        timeout = call.timeout(self.timeout)
        if silence is not None:
            timeout.read = silence
        request = self._http.build_request(
            call.method, call.path, params=call.query or None, headers=call.headers, content=body, timeout=timeout
        )
        response = self._http.send(request, stream=call.streams)
        if call.streams and response.status_code >= 400:
            try:
                response.read()
            finally:
                response.close()
        return response


@contextmanager
def transport_errors() -> Iterator[None]:
    """What breaks while an answer is read."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise WaitTimeout("no_answer", "nothing came from the daemon for too long") from error
    except httpx.TransportError as error:
        raise connection_lost(error) from error
