"""A fork, and what can be done with it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from .. import _calls as calls
from .._errors import ExecError, NotFound, OffshootError
from .._files import Content, sized
from .._given import Child
from .._handle import Handle
from .._models import Evaluation, ExecResult, ForkInfo, LogChunk, Moved, Pong, Summary
from .._tar import pack, unpack
from .connection import Connection
from .events import log_chunks
from .stream import ExecStream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._given import Given
    from .forks import Forks

# Bytes of a file in memory at once.
PART = 256 << 10


class Fork(Handle):
    """A running clone with an identity of its own. As a context manager it is ended when the block is left, however it is left."""

    def __init__(self, connection: Connection, summary: Summary) -> None:
        self._connection = connection
        self._summary = summary

    def __enter__(self) -> Fork:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.kill(missing_ok=True)
        except OffshootError as failure:
            if kind is None:
                raise
            # What happened in the block counts more.
            warnings.warn(f"{self.name} could not be ended: {failure}", ResourceWarning, stacklevel=2)

    def inspect(self) -> ForkInfo:
        """How it is now, with its identity report."""
        info = self._connection.call(calls.get_fork(self.id))
        self._summary = info
        return info

    def ping(self) -> Pong:
        """Asks the agent in it whether it is well."""
        return self._connection.call(calls.ping(self.id))

    def exec(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        stdin: str | bytes | None = None,
        check: bool = False,
    ) -> ExecResult:
        """Runs a command and waits for it; after ``timeout`` seconds it is ended. With ``check`` one that fails raises ExecError."""
        command = calls.command(argv, env, workdir, user, timeout)
        result = self._connection.call(calls.exec_(self.id, command, stdin, timeout))
        if check and (result.code != 0 or result.timed_out):
            raise ExecError(argv, result)
        return result

    def stream(
        self,
        argv: Sequence[str],
        *,
        tty: bool | tuple[int, int] | None = None,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
    ) -> ExecStream:
        """Runs a command whose input and output go as they come; ``tty`` is True or (rows, columns). To be used with ``with``."""
        command = calls.command(argv, env, workdir, user, timeout)
        return ExecStream(self._connection.address, calls.exec_path(self.id), command, tty, self._connection.timeout)

    def eval(self, code: str, *, timeout: float = 30.0) -> Any:
        """The value of the code's last expression, in the warmed runtime; what the code raises is raised here as EvalError."""
        return self.evaluate(code, timeout=timeout).value

    def evaluate(self, code: str, *, timeout: float = 30.0) -> Evaluation:
        """The same, with what the code printed and how the runtime prints the value."""
        return self._connection.call(calls.evaluate(self.id, code, timeout))

    def read_file(self, path: str) -> bytes:
        """The content of one file."""
        return b"".join(self.iter_file(path))

    def iter_file(self, path: str) -> Iterator[bytes]:
        """The content of one file in parts, as they come."""
        with self._connection.stream(calls.read_file(self.id, path, archive=False)) as response:
            yield from response.iter_bytes(PART)

    def write_file(self, path: str, content: Content, *, mode: int = 0o644) -> None:
        """Writes one file: bytes, a text, a path of this side, or an open file that can be sought in. It is sent in parts."""
        body, length = sized(content)
        self._connection.call(calls.write_file(self.id, path, body, length, mode))

    def download(self, path: str, to: str | os.PathLike[str], *, limit: int | None = None) -> Path:
        """Copies a file or folder here as ``cp -r`` does, and gives its path: below ``to`` if that is a folder, else as ``to``.

        What a fork sends counts as hostile: what would lie outside of the destination is refused with HostileArchive, and so is more than
        ``limit`` bytes.
        """
        with self._connection.stream(calls.read_file(self.id, path, archive=True)) as response:
            parts = response.iter_bytes(PART)
            return unpack(lambda: next(parts, b""), Path(to), limit)

    def upload(self, source: str | os.PathLike[str], path: str) -> None:
        """Copies a file or folder into the fork as ``cp -r`` does."""
        local = Path(source)
        local.stat()
        self._connection.call(calls.write_file(self.id, path, lambda: pack(local), None, None))

    def logs(self, *, follow: bool = False) -> Iterator[LogChunk]:
        """What its services and its runtime wrote; with ``follow`` also what comes."""
        return log_chunks(self._connection, self.id, follow)

    def standby(self) -> Moved:
        """Puts it to disk: its memory, disk and devices; its machine ends. ``resume`` brings it back."""
        moved = self._connection.call(calls.standby(self.id))
        self._summary = moved.fork
        return moved

    def resume(self) -> Moved:
        """Brings it back from standby: the same fork, at the right time, with fresh randomness."""
        moved = self._connection.call(calls.resume(self.id))
        self._summary = moved.fork
        return moved

    @overload
    def fork(self, *, n: None = None, children: None = None, **given: Unpack[Given]) -> Fork: ...
    @overload
    def fork(self, *, n: int, children: Sequence[Child] | None = None, **given: Unpack[Given]) -> Forks: ...
    @overload
    def fork(self, *, children: Sequence[Child], n: int | None = None, **given: Unpack[Given]) -> Forks: ...
    def fork(
        self, *, n: int | None = None, children: Sequence[Child] | None = None, **given: Unpack[Given]
    ) -> Fork | Forks:
        """Forks this fork: the new ones go on from where it is, each as itself, and it goes on too. Otherwise as Client.fork."""
        from .forks import make

        forks = make(self._connection, {"from": self.id}, n, children, given)
        return forks[0] if n is None and children is None else forks

    def kill(self, *, missing_ok: bool = False) -> None:
        """Ends it. Everything it had is removed."""
        try:
            self._connection.call(calls.kill(self.id))
        except NotFound:
            if not missing_ok:
                raise
