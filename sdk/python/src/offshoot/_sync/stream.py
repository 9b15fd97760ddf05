"""A command whose input and output go as they come."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect, unix_connect

from .. import _wire as wire
from .._address import Address
from .._errors import ConnectionFailed, ExecError, ProtocolError, WaitTimeout, from_body
from .._exchange import connection_lost, unreachable
from .._models import Chunk, ExitStatus


class ExecStream:
    """A running command: a context manager, and an iterator over its output.

    When the block is left the command is ended, with everything it started, if it has not ended by itself. Input is taken only as fast as the
    command reads it: who writes much to a command that answers much reads in another thread meanwhile.
    """

    def __init__(
        self, address: Address, path: str, command: dict[str, Any], tty: bool | tuple[int, int] | None, timeout: float
    ) -> None:
        self._address, self._path, self._timeout = address, path, timeout
        self._argv: Sequence[str] = command["argv"]
        self._begin = wire.begin(command, tty)
        self._open = ExitStack()
        self._socket: ClientConnection | None = None
        self.exit: ExitStatus | None = None
        """How it ended, once its output has been read."""

    def __enter__(self) -> ExecStream:
        options: dict[str, Any] = {
            "additional_headers": self._address.headers,
            "open_timeout": self._timeout,
            "max_size": wire.MAX_MESSAGE,
            "compression": None,
            "proxy": None,
        }
        uri = self._address.websocket_url + self._path
        try:
            if self._address.socket:
                socket = unix_connect(self._address.socket, uri, **options)
            else:
                socket = connect(uri, ssl=self._address.tls, **options)
            self._socket = self._open.enter_context(socket)
            self._socket.send(self._begin)
        except InvalidStatus as error:
            raise from_body(bytes(error.response.body or b""), error.response.status_code) from error
        except TimeoutError as error:
            raise WaitTimeout("no_answer", "the daemon did not answer in time") from error
        except OSError as error:
            raise unreachable(error) from error
        except InvalidHandshake as error:
            raise ProtocolError("no_websocket", "the daemon does not take WebSockets there") from error
        except ConnectionClosed as error:
            raise connection_lost(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the command if it still runs."""
        self._open.close()

    def __iter__(self) -> ExecStream:
        return self

    def __next__(self) -> Chunk:
        if self.exit is not None:
            raise StopIteration
        try:
            heard = wire.heard(self._running().recv())
        except ConnectionClosed as error:
            raise connection_lost(error) from error
        if isinstance(heard, ExitStatus):
            self.exit = heard
            raise StopIteration
        return heard

    def write(self, data: bytes | str) -> None:
        """Input for the command."""
        for part in wire.parts(data.encode() if isinstance(data, str) else data):
            self._say(part)

    def close_stdin(self) -> None:
        """The end of its input."""
        self._say(wire.CLOSE_STDIN)

    def signal(self, number: int) -> None:
        """Sends it a signal (``signal.SIGTERM``)."""
        self._say(wire.signal(number))

    def resize(self, rows: int, cols: int) -> None:
        """Gives its terminal another size."""
        self._say(wire.resize(rows, cols))

    def wait(self, check: bool = False) -> ExitStatus:
        """Reads what is left of its output, forgets it, and says how the command ended."""
        for _ in self:
            pass
        if self.exit is None:
            raise ConnectionFailed("connection_lost", "the stream ended before the command")
        if check and (self.exit.code != 0 or self.exit.timed_out):
            raise ExecError(self._argv, self.exit)
        return self.exit

    def _say(self, message: bytes | str) -> None:
        try:
            self._running().send(message)
        except ConnectionClosed as error:
            raise connection_lost(error) from error

    def _running(self) -> ClientConnection:
        if self._socket is None:
            raise RuntimeError("a stream is used as a context manager: with fork.stream(...) as run:")
        return self._socket
