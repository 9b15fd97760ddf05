"""What can go wrong: one hierarchy, made from the daemon's problem documents (RFC 9457)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._models import ExecResult, ExitStatus


class OffshootError(Exception):
    """Something failed. Programs look at the class, or at ``code``, which is stable; ``detail`` is for people.

    ``status`` is the HTTP status, 0 where no answer came. ``results`` has one entry for each fork of a request, where forks were asked for.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        status: int = 0,
        field: str | None = None,
        causes: Sequence[str] = (),
        next: str | None = None,  # noqa: A002 - the daemon's word
        request_id: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.status = status
        self.field = field
        self.causes = list(causes)
        self.next = next
        self.request_id = request_id

    def __str__(self) -> str:
        text = f"{self.code}: {self.detail}"
        if self.field:
            text += f" (field {self.field})"
        for cause in self.causes:
            text += f"; {cause}"
        if self.next:
            text += f"; next: {self.next}"
        return text


class InvalidRequest(OffshootError):
    """The request is wrong; ``field`` says where. Nothing was begun."""


class Unauthorized(OffshootError):
    """There is no token, or it is good for nothing (any more)."""


class Forbidden(OffshootError):
    """The token's scope does not allow this."""


class NotFound(OffshootError):
    """There is no such fork, template, job, recipe or token."""


class Conflict(OffshootError):
    """It does not go with what is there: a name is taken, a fork is in standby, a template exists."""


class NotSupported(OffshootError):
    """This engine, template or host can not do that; no work was begun."""


class AckTimeout(OffshootError):
    """A fork, its network or a mailbox's owner did not acknowledge in time; that fork was destroyed."""


class GuestTimeout(OffshootError):
    """The guest did not answer in time."""


class GuestFailed(OffshootError):
    """The guest ended, refused, or sent what it must not."""


class HostileArchive(GuestFailed):
    """An archive from a fork tried to write where it must not, or was cut off."""


class RateLimited(OffshootError):
    """Too many requests with this token, also after waiting."""


class Unavailable(OffshootError):
    """The daemon can not do this now: it is about to end, or something of it is used up."""


class ServerError(OffshootError):
    """The daemon or its host failed."""


class ConnectionFailed(OffshootError):
    """The daemon can not be reached (``unreachable``), or the connection broke (``connection_lost``): what was asked may be done or not."""


class WaitTimeout(OffshootError, TimeoutError):
    """This side waited no longer. What was asked goes on."""


class ProtocolError(OffshootError):
    """The daemon's answer can not be understood: it is another version, or no offshoot."""


class ExecError(OffshootError):
    """A command failed, and ``check`` was asked for."""

    def __init__(self, argv: Sequence[str], result: ExecResult | ExitStatus) -> None:
        why = "ran out of time" if result.timed_out else result.error or f"ended with {result.code}"
        # Arguments may be secret: only the program is named.
        super().__init__("command_failed", f"{argv[0] if argv else 'the command'} {why}")
        self.result = result


class EvalError(OffshootError):
    """Code raised something in the fork. ``kind`` is ``exception``, ``timeout``, ``runtime-died``, ``no-runtime`` or ``too-large``."""

    def __init__(self, kind: str, message: str, stack: str, stdout: str, stderr: str) -> None:
        super().__init__("eval_timeout" if kind == "timeout" else kind.replace("-", "_"), message)
        self.kind = kind
        self.stack = stack
        self.stdout = stdout
        self.stderr = stderr


_BY_CODE: dict[str, type[OffshootError]] = {
    "ack_timeout": AckTimeout,
    "network_ack_timeout": AckTimeout,
    "guest_timeout": GuestTimeout,
    "guest_stalled": GuestTimeout,
    "engine_timeout": GuestTimeout,
    "guest_refused": GuestFailed,
    "hostile_archive": HostileArchive,
    "not_supported": NotSupported,
    "no_network_card": NotSupported,
    "limit_not_possible": NotSupported,
    "needs_tap": NotSupported,
    "network_denied": NotSupported,
    "passt_missing": NotSupported,
    # A mailbox of the request: the template has no such one.
    "mailbox_not_found": NotFound,
}

_BY_STATUS: dict[int, type[OffshootError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    429: RateLimited,
    502: GuestFailed,
    503: Unavailable,
    504: GuestTimeout,
}


def from_problem(problem: Any, status: int = 0, request_id: str | None = None) -> OffshootError:
    """The exception for a problem document."""
    if not isinstance(problem, dict) or not isinstance(problem.get("code"), str):
        return ProtocolError(
            "no_problem_document", f"the answer has the status {status} and is no problem document", status=status
        )

    def text(name: str) -> str | None:
        value = problem.get(name)
        return value if isinstance(value, str) else None

    code = problem["code"]
    number = problem.get("status")
    status = number if isinstance(number, int) else status
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status)
    if kind is None:
        kind = InvalidRequest if 400 <= status < 500 else ServerError
    causes = problem.get("causes")
    return kind(
        code,
        text("detail") or code,
        status=status,
        field=text("field"),
        causes=[cause for cause in causes if isinstance(cause, str)] if isinstance(causes, list) else [],
        next=text("next"),
        request_id=request_id,
    )


def from_body(body: bytes, status: int, request_id: str | None = None) -> OffshootError:
    """The exception for an answer that is none of success."""
    try:
        problem = json.loads(body)
    except ValueError:
        problem = None
    return from_problem(problem, status, request_id)
