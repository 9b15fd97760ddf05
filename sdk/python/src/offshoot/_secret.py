"""Values that do not print."""

from __future__ import annotations

import hmac


class Secret:
    """A text that is not shown: not by ``repr``, ``str`` or formatting, and so in no log and no error.

    Python can not wipe memory; what is kept out here is what is written down by accident.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The text itself."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __format__(self, _spec: str) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(self._value)


def revealed(value: str | Secret) -> str:
    """The text, whichever way it was given."""
    return value.reveal() if isinstance(value, Secret) else value
