"""Answers become dataclasses. Fields that are not known are passed over: the daemon may be newer."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ._errors import ProtocolError

T = TypeVar("T")


@functools.cache
def _fields(kind: type) -> tuple[tuple[str, Any, bool], ...]:
    hints = get_type_hints(kind)
    return tuple(
        (
            field.name,
            hints[field.name],
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        )
        for field in dataclasses.fields(kind)
        if field.init
    )


def decode(kind: type[T], value: object, at: str = "the answer") -> T:
    """``value`` as a ``kind``, or a ProtocolError that says where it is not."""
    return cast("T", _decode(kind, value, at))


def _decode(kind: Any, value: Any, at: str) -> Any:
    if kind is Any:
        return value
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [part for part in get_args(kind) if part is not type(None)]
        return _decode(inner, value, at)
    if origin is list and isinstance(value, list):
        (inner,) = get_args(kind)
        return [_decode(inner, item, f"{at}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        _, inner = get_args(kind)
        return {key: _decode(inner, item, f"{at}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        found = {}
        for name, hint, needed in _fields(kind):
            if name in value:
                found[name] = _decode(hint, value[name], f"{at}.{name}")
            elif needed and type(None) in get_args(hint):
                found[name] = None
            elif needed:
                raise ProtocolError("unexpected_answer", f"{at} has no {name}")
        return kind(**found)
    # bool is an int for Python, and none here.
    if isinstance(kind, type) and (type(value) is kind or (kind is float and type(value) is int)):
        return value
    raise ProtocolError("unexpected_answer", f"{at} is not what this client expects; is the daemon of another version?")
