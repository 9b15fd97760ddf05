"""What forks are given, and how it goes into a request. Values that may be secret are in no ``repr``."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from ._secret import Secret, revealed


@dataclass(frozen=True)
class File:
    """A file that is written before the workload runs: text, or bytes."""

    content: str | bytes = field(repr=False)
    mode: int = 0o644


@dataclass(frozen=True)
class Mailbox:
    """A payload for a program of the guest that planted a mailbox.

    ``payload`` becomes a JSON object, or is the text of one. With ``wait_for_ack`` the fork counts as made only
    once the mailbox's owner has acknowledged, within ``ack_timeout`` seconds (5 without it, 30 at most).
    """

    name: str
    payload: Mapping[str, Any] | str = field(repr=False)
    token: str | Secret | None = field(default=None, repr=False)
    wait_for_ack: bool = False
    ack_timeout: float | None = None


@dataclass(frozen=True)
class Limits:
    """What each fork may use; what is None is not limited."""

    memory_bytes: int | None = None
    cpu_millis: int | None = None
    pids: int | None = None


@dataclass(frozen=True)
class Network:
    """Where a fork's card leads to; docs/network.md of offshoot has the whole of it. ``timeout`` is in seconds."""

    mode: str | None = None
    egress: str | None = None
    net: str | None = None
    publish: Sequence[str] = ()
    rate_bytes: int | None = None
    dns: Sequence[str] = ()
    timeout: float | None = None
    wait: bool = True
    on_failure: str | None = None


@dataclass(frozen=True)
class Child:
    """What one fork of a request is given besides what all are given; the same key, path or mailbox replaces."""

    name: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: Mapping[str, str | Secret] = field(default_factory=dict, repr=False)
    files: Mapping[str, File | str | bytes] = field(default_factory=dict, repr=False)
    mailboxes: Sequence[Mailbox] = ()


class Given(TypedDict, total=False):
    """What all forks of a request are given: keyword arguments of ``fork`` and ``forking``."""

    name: str | None
    """The name; with several forks ``-1``, ``-2``… are appended."""
    labels: Mapping[str, str]
    env: Mapping[str, str]
    """Variables of everything that runs in it."""
    secrets: Mapping[str, str | Secret]
    """In the fork each is a file of mode 0400 below ``/run/offshoot/secrets``."""
    files: Mapping[str, File | str | bytes]
    """Path in the guest → content."""
    mailboxes: Sequence[Mailbox]
    network: Network | None
    limits: Limits | None
    all_or_nothing: bool
    """Without False, either all forks of the request are there or none. With False those that could be made stay, and ``failed`` of the list
    says which could not."""
    idempotency_key: str | None
    """The same request with the same key, within a day, gives the same forks. Without one a random key is used for this call."""


def fork_body(source: Mapping[str, str], n: int | None, children: Sequence[Child] | None, given: Given) -> bytes:
    """The JSON of a request for forks."""
    unknown = given.keys() - Given.__annotations__.keys()
    if unknown:
        raise TypeError(f"forks are not given {', '.join(sorted(unknown))}")
    body: dict[str, Any] = dict(source)
    if n is not None:
        body["count"] = n
    if given.get("name"):
        body["name"] = given["name"]
    body |= _common(
        given.get("labels") or {},
        given.get("env") or {},
        given.get("secrets") or {},
        given.get("files") or {},
        given.get("mailboxes") or (),
    )
    if limits := given.get("limits"):
        body["limits"] = _without_none(vars(limits))
    if network := given.get("network"):
        body["network"] = _network(network)
    if children:
        body["children"] = [
            _without_none({"name": child.name})
            | _common(child.labels, child.env, child.secrets, child.files, child.mailboxes)
            for child in children
        ]
    body["all_or_nothing"] = given.get("all_or_nothing", True)
    return dump(body)


def dump(body: Mapping[str, Any]) -> bytes:
    """JSON as bytes; NaN is none."""
    return json.dumps(body, allow_nan=False, ensure_ascii=False).encode()


def _common(
    labels: Mapping[str, str],
    env: Mapping[str, str],
    secrets: Mapping[str, str | Secret],
    files: Mapping[str, File | str | bytes],
    mailboxes: Sequence[Mailbox],
) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "labels": dict(labels),
        "env": dict(env),
        "secrets": {name: revealed(value) for name, value in secrets.items()},
        "files": [_file(path, file) for path, file in files.items()],
        "mailboxes": [_mailbox(mailbox) for mailbox in mailboxes],
    }
    return {name: part for name, part in parts.items() if part}


def _file(path: str, file: File | str | bytes) -> dict[str, Any]:
    file = file if isinstance(file, File) else File(file)
    spec: dict[str, Any] = {"path": path, "mode": f"{file.mode:04o}"}
    if isinstance(file.content, str):
        spec["content"] = file.content
    else:
        spec["content_base64"] = base64.b64encode(file.content).decode()
    return spec


def _mailbox(mailbox: Mailbox) -> dict[str, Any]:
    payload = mailbox.payload
    # A text is parsed, so that one that is no JSON is an error here and can not change the rest of the request.
    spec: dict[str, Any] = {
        "name": mailbox.name,
        "payload": json.loads(payload) if isinstance(payload, str) else dict(payload),
    }
    if mailbox.token is not None:
        spec["token"] = revealed(mailbox.token)
    if mailbox.wait_for_ack:
        spec["wait_for_ack"] = True
    if mailbox.ack_timeout is not None:
        spec["ack_timeout_ms"] = millis(mailbox.ack_timeout)
    return spec


def _network(network: Network) -> dict[str, Any]:
    spec = _without_none(
        {
            "mode": network.mode,
            "egress": network.egress,
            "net": network.net,
            "rate_bytes": network.rate_bytes,
            "on_failure": network.on_failure,
        }
    )
    spec |= {"publish": list(network.publish), "dns": list(network.dns), "wait": network.wait}
    if network.timeout is not None:
        spec["timeout_ms"] = millis(network.timeout)
    return spec


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def millis(seconds: float) -> int:
    """Seconds as whole milliseconds, at least one: 0 has a meaning of its own."""
    if seconds <= 0:
        raise ValueError("a time is more than 0 seconds")
    return max(1, round(seconds * 1000))
