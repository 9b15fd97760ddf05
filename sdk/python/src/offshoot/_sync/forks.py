"""Several forks at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

from .. import _calls as calls
from .._errors import OffshootError
from .._given import Child
from .connection import Connection
from .fork import Fork

if TYPE_CHECKING:
    from .._given import Given

# Forks that are ended at once.
AT_ONCE = 8


class Forks(list[Fork]):
    """Forks of one request, in its order. As a context manager all are ended when the block is left, however it is left."""

    def __init__(self, forks: Iterable[Fork] = (), failed: Sequence[tuple[int, OffshootError]] = ()) -> None:
        super().__init__(forks)
        self.failed = list(failed)
        """Those that could not be made, by their place in the request; only after ``all_or_nothing=False``."""

    def __enter__(self) -> Forks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.kill()
        except OffshootError as failure:
            if kind is None:
                raise
            # What happened in the block counts more.
            warnings.warn(f"a fork could not be ended: {failure}", ResourceWarning, stacklevel=2)

    def kill(self) -> None:
        """Ends all, also those after one that can not be ended, for which it raises then. One that is gone already is no failure."""

        def end(fork: Fork) -> OffshootError | None:
            try:
                fork.kill(missing_ok=True)
            except OffshootError as error:
                return error
            return None

        with ThreadPoolExecutor(AT_ONCE) as pool:
            failures = [failure for failure in pool.map(end, self) if failure]
        if failures:
            raise failures[0]


def make(
    connection: Connection, source: Mapping[str, str], n: int | None, children: Sequence[Child] | None, given: Given
) -> Forks:
    """Asks for forks of a template or a fork."""
    made = connection.call(calls.fork(source, n, children, given))
    return Forks((Fork(connection, info) for info in made.forks), made.failed)
