"""What is said over the WebSocket of a command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ._decode import decode
from ._errors import ProtocolError, from_problem
from ._models import Chunk, ExitStatus

# The daemon takes messages of 1 MiB.
MAX_INPUT = 256 << 10
# What it sends has 64 KiB.
MAX_MESSAGE = 1 << 20

_SOURCES = {1: "stdout", 2: "stderr"}


def begin(command: dict[str, Any], tty: bool | tuple[int, int] | None) -> str:
    """The first message: the command, with a terminal of (rows, columns) if that is asked for."""
    if tty is not None and tty is not False:
        rows, cols = (24, 80) if tty is True else tty
        command = {**command, "tty": {"rows": rows, "cols": cols}}
    return json.dumps(command)


def resize(rows: int, cols: int) -> str:
    """Another size of the terminal."""
    return json.dumps({"resize": {"rows": rows, "cols": cols}})


def signal(number: int) -> str:
    """A signal for the command."""
    return json.dumps({"signal": int(number)})


CLOSE_STDIN = json.dumps({"close_stdin": True})


def parts(data: bytes) -> Iterator[bytes]:
    """Input in messages that the daemon takes."""
    return (data[at : at + MAX_INPUT] for at in range(0, len(data), MAX_INPUT))


def heard(message: str | bytes) -> Chunk | ExitStatus:
    """What a message of the daemon means; a problem is raised."""
    if isinstance(message, bytes):
        if not message or message[0] not in _SOURCES:
            raise ProtocolError("unexpected_answer", "output of no stream that is known")
        return Chunk(_SOURCES[message[0]], message[1:])
    try:
        said = json.loads(message)
    except ValueError:
        said = None
    if isinstance(said, dict) and "exit" in said:
        return decode(ExitStatus, said["exit"], "exit")
    if isinstance(said, dict) and "problem" in said:
        raise from_problem(said["problem"])
    raise ProtocolError("unexpected_answer", "the daemon said what this client does not know")
