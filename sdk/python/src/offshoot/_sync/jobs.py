"""Long work and its progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Generic, TypeVar

from .. import _calls as calls
from .._decode import decode
from .._errors import WaitTimeout, from_problem
from .._exchange import connection_lost
from .._models import JobInfo
from .connection import Connection
from .events import PASSING, SILENCE, server_events

T = TypeVar("T")


class Job(Generic[T]):
    """Work that goes on in the daemon, whoever looks at it."""

    def __init__(self, connection: Connection, info: JobInfo, parse: Callable[[Any], T]) -> None:
        self._connection = connection
        self._parse = parse
        self.info = info
        """As it was when it was last looked at."""

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.info.kind} {self.info.template} {self.info.state}>"

    @property
    def id(self) -> str:
        """Its id."""
        return self.info.id

    def refresh(self) -> JobInfo:
        """Looks at it again."""
        self.info = self._connection.call(calls.job(self.id))
        return self.info

    def progress(self, timeout: float | None = None) -> Iterator[JobInfo]:
        """The job at each of its steps; the last has its end. A connection that breaks is made again.

        Raises WaitTimeout after ``timeout`` seconds; the job goes on.
        """
        end = None if timeout is None else time.monotonic() + timeout
        failures = 0
        while True:
            left = SILENCE if end is None else min(SILENCE, end - time.monotonic())
            if left <= 0:
                raise WaitTimeout("still_running", f"job {self.id} is still running")
            try:
                with closing(server_events(self._connection, calls.job_events(self.id), left)) as events:  # type: ignore[type-var]
                    for event in events:
                        failures = 0
                        self.info = decode(JobInfo, event.json(), "job")
                        yield self.info
                        if self.info.state != "running":
                            return
                        if end is not None and time.monotonic() >= end:
                            break
                    else:
                        raise connection_lost(None)
            except PASSING as error:
                if isinstance(error, WaitTimeout) and end is not None and time.monotonic() >= end:
                    continue
                failures += 1
                if failures > self._connection.retry.attempts:
                    raise
                time.sleep(self._connection.retry.pause(failures))

    def wait(self, timeout: float | None = None) -> T:
        """What came of it; raises why it failed, or WaitTimeout after ``timeout`` seconds."""
        for _ in self.progress(timeout):
            pass
        if self.info.state == "failed":
            raise from_problem(self.info.error)
        return self._parse(self.info.result)
