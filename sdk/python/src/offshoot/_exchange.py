"""One call: what is sent, what is sent again, and for how long. Nothing here does input or output, so both clients share it.

| what happened | what is done |
|---|---|
| no connection | sent again, up to ``attempts`` times: nothing was done |
| the connection broke | sent again only if the call may be done twice, or carries an Idempotency-Key |
| 429 or 503 with Retry-After | sent again after that time, or after the pause if that is longer; not if it is more than ``longest`` |
| 409 idempotency_in_progress | asked again until ``patience`` is used up: another connection of ours began it |
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import httpx

from ._errors import ConnectionFailed, OffshootError, WaitTimeout, from_body

T = TypeVar("T")


@dataclass(frozen=True)
class Retry:
    """How often a request is sent, and how long is waited in between; seconds. ``Retry(attempts=1)`` sends once."""

    attempts: int = 4
    first: float = 0.2
    longest: float = 30.0
    patience: float = 600.0

    def pause(self, attempt: int) -> float:
        """The pause after attempt ``attempt``, from 1: doubled each time, and random so that many clients do not come at once."""
        return min(self.longest, self.first * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)  # noqa: S311


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and how its answer is understood."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    # What may be secret is not in the repr. A function gives the parts of a long body, anew for each attempt.
    body: bytes | Callable[[], Iterator[bytes]] | None = field(default=None, repr=False)
    # May be done twice: its second answer is as good as the first.
    repeatable: bool = False
    # That it is gone already, when sent again, means that the first was done.
    removes: bool = False
    # Seconds of silence that are normal, above the client's own limit; None: any.
    silence: float | None = 0.0
    # The answer's body is read by the caller.
    streams: bool = False

    def timeout(self, usual: float) -> httpx.Timeout:
        """Limits of this call for a client whose own limit is ``usual``."""
        return httpx.Timeout(usual, read=None if self.silence is None else usual + self.silence)


@dataclass(frozen=True)
class Pause:
    """Seconds to wait before the next attempt."""

    seconds: float


def exchange(call: Call[T], retry: Retry) -> Generator[Call[T] | Pause, httpx.Response | None, httpx.Response]:
    """Yields what to do: send the call (an answer is sent back in, or httpx's error thrown), or wait. Returns the answer that counts."""
    attempt, waited = 0, 0.0
    while True:
        attempt += 1
        failure: OffshootError
        cause: Exception | None = None
        pause: float | None = None
        try:
            response = yield call
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            failure, cause = unreachable(error), error
            pause = retry.pause(attempt)
        except httpx.TimeoutException as error:
            raise WaitTimeout(
                "no_answer", "the daemon did not answer in time; what was asked may be done or not"
            ) from error
        except httpx.TransportError as error:
            failure, cause = connection_lost(error), error
            pause = retry.pause(attempt) if call.repeatable else None
        else:
            if response is None:
                raise RuntimeError("no answer was handed in")
            if response.status_code < 400:
                return response
            failure = from_body(response.content, response.status_code, response.headers.get("x-request-id"))
            if attempt > 1 and call.removes and response.status_code == 404:
                return response
            if failure.code == "idempotency_in_progress" and waited < retry.patience:
                pause, attempt = retry.pause(min(attempt, 4)), min(attempt, retry.attempts - 1)
            elif response.status_code in (429, 503):
                pause = _asked_pause(response, retry, attempt)
        if pause is None or attempt >= retry.attempts:
            raise failure from cause
        waited += pause
        yield Pause(pause)


def _asked_pause(response: httpx.Response, retry: Retry, attempt: int) -> float | None:
    # Without it nothing says that another try is worth it: an answer that was noted for a key comes again and again.
    try:
        seconds = float(response.headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return max(seconds, retry.pause(attempt)) if 0 <= seconds <= retry.longest else None


def unreachable(error: Exception) -> ConnectionFailed:
    """The daemon can not be reached."""
    return ConnectionFailed("unreachable", f"the daemon can not be reached: {error}", next="offshoot serve")


def connection_lost(error: Exception | None) -> ConnectionFailed:
    """The connection broke in the middle."""
    return ConnectionFailed("connection_lost", f"the connection to the daemon broke: {error or 'it was closed'}")
