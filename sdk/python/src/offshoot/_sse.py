"""Server-sent events: lines become events (the part of the standard that the daemon uses)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ._errors import ProtocolError

# Most bytes of one event: a verdict on 1000 forks has some hundred thousand.
MAX_EVENT = 32 << 20


@dataclass(frozen=True)
class ServerEvent:
    """One event: its kind, its id if it has one, and its data."""

    kind: str
    id: str | None
    data: str

    def json(self) -> Any:
        """The data as JSON."""
        try:
            return json.loads(self.data)
        except ValueError as error:
            raise ProtocolError("unexpected_answer", "an event's data is no JSON") from error


class Parser:
    """Takes bytes as they come, and gives the events that are whole."""

    def __init__(self) -> None:
        self._rest = b""
        self._kind = ""
        self._id: str | None = None
        self._data: list[str] = []
        self._size = 0

    def feed(self, data: bytes) -> list[ServerEvent]:
        """The events that end in ``data``."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._size += len(data)
        events = [event for line in lines if (event := self._line(line.rstrip(b"\r").decode("utf-8", "replace")))]
        if self._size > MAX_EVENT:
            raise ProtocolError("unexpected_answer", "an event is too long")
        return events

    def _line(self, line: str) -> ServerEvent | None:
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                self._kind = value
            elif name == "id":
                self._id = value
            elif name == "data":
                self._data.append(value)
            return None
        event = ServerEvent(self._kind, self._id, "\n".join(self._data)) if self._data else None
        self._kind, self._id, self._data, self._size = "", None, [], len(self._rest)
        return event
