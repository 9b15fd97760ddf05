"""Every route: how it is asked, and what its answer means. Both clients send these."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from . import _models as m
from ._decode import decode
from ._errors import EvalError, OffshootError, ProtocolError, from_problem
from ._exchange import Call
from ._given import Child, Given, dump, fork_body, millis

T = TypeVar("T")
JSON = {"Content-Type": "application/json"}
# Forks may be many and the host busy; what the request waits for besides is in it.
MAKING = 600.0
# Standby writes memory to disk.
MOVING = 600.0
# An event stream is silent for 15 seconds at most.
EVENTS = {"Accept": "text/event-stream"}


def _json(response: httpx.Response) -> Any:
    try:
        return json.loads(response.content)
    except ValueError as error:
        raise ProtocolError("unexpected_answer", "the answer is no JSON; is this an offshoot daemon?") from error


def _as(kind: type[T]) -> Callable[[httpx.Response], T]:
    return lambda response: decode(kind, _json(response))


def _list_of(kind: type[T], name: str) -> Callable[[httpx.Response], list[T]]:
    def parse(response: httpx.Response) -> list[T]:
        body = _json(response)
        items = body.get(name) if isinstance(body, dict) else None
        if not isinstance(items, list):
            raise ProtocolError("unexpected_answer", f"the answer has no {name}")
        return [decode(kind, item, f"{name}[{index}]") for index, item in enumerate(items)]

    return parse


def _nothing(_: httpx.Response) -> None:
    return None


def _response(response: httpx.Response) -> httpx.Response:
    return response


def _get(path: str, parse: Callable[[httpx.Response], T], query: dict[str, str] | None = None) -> Call[T]:
    return Call("GET", path, parse, query or {}, repeatable=True)


def _stream(
    path: str, query: dict[str, str], headers: dict[str, str], silence: float | None = 0.0
) -> Call[httpx.Response]:
    return Call("GET", path, _response, query, headers, repeatable=True, silence=silence, streams=True)


def _at(*parts: str) -> str:
    # A path of only dots would be taken for a step in the tree, and an empty one for another route.
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError("a name is not empty, and not a row of dots")
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


# Templates


def templates() -> Call[list[m.Template]]:
    return _get("/v1/templates", _list_of(m.Template, "templates"))


def template(tag: str) -> Call[m.Template]:
    return _get(_at("templates", tag), _as(m.Template))


def mailboxes(tag: str) -> Call[m.Mailboxes]:
    return _get(_at("templates", tag, "mailboxes"), _as(m.Mailboxes))


def build(
    recipe: str, tag: str, memory_bytes: int | None, vcpus: int | None, engine: str | None, strict: bool
) -> Call[m.JobInfo]:
    wanted = {"recipe": recipe, "tag": tag, "memory_bytes": memory_bytes, "vcpus": vcpus, "engine": engine}
    if strict:
        wanted["strict"] = True
    body = dump({name: value for name, value in wanted.items() if value is not None})
    return Call("POST", "/v1/templates", _as(m.JobInfo), headers=JSON, body=body)


def verify(tag: str, count: int) -> Call[m.JobInfo]:
    return Call("POST", _at("templates", tag, "verify"), _as(m.JobInfo), headers=JSON, body=dump({"count": count}))


def delete_template(tag: str) -> Call[None]:
    return Call("DELETE", _at("templates", tag), _nothing, repeatable=True, removes=True)


# Forks


class Made:
    """What became of a request for forks: those that are there, and by their place in the request those that are not."""

    def __init__(self, forks: list[m.ForkInfo], failed: list[tuple[int, OffshootError]]) -> None:
        self.forks = forks
        self.failed = failed


def fork(source: Mapping[str, str], n: int | None, children: Sequence[Child] | None, given: Given) -> Call[Made]:
    key = given.get("idempotency_key") or str(uuid.uuid4())
    body = fork_body(source, n, children, given)
    # The key makes it safe to send it again.
    return Call(
        "POST", "/v1/forks", _made, headers={**JSON, "Idempotency-Key": key}, body=body, repeatable=True, silence=MAKING
    )


def _made(response: httpx.Response) -> Made:
    made = Made([], [])
    for outcome in _list_of(dict, "results")(response):
        if outcome.get("fork") is not None:
            made.forks.append(decode(m.ForkInfo, outcome["fork"], "fork"))
        else:
            made.failed.append((decode(int, outcome.get("index"), "index"), from_problem(outcome.get("error"))))
    return made


class Page:
    """A page of forks, and what to ask the next one with."""

    def __init__(self, response: httpx.Response) -> None:
        self.forks = _list_of(m.Summary, "forks")(response)
        following = _json(response).get("next")
        self.next = following if isinstance(following, str) else None


def forks(
    template: str | None, state: str | None, labels: Mapping[str, str] | None, limit: int, after: str | None
) -> Call[Page]:
    query = {"template": template, "state": state, "after": after, "limit": str(limit)}
    if labels:
        if any("," in text or "=" in key for key, value in labels.items() for text in (key, value)):
            raise ValueError("labels with commas, or keys with '=', can not be asked for")
        query["label"] = ",".join(f"{key}={value}" for key, value in labels.items())
    return _get("/v1/forks", Page, {name: value for name, value in query.items() if value is not None})


def get_fork(fork: str) -> Call[m.ForkInfo]:
    return _get(_at("forks", fork), _as(m.ForkInfo))


def kill(fork: str) -> Call[None]:
    return Call("DELETE", _at("forks", fork), _nothing, repeatable=True, removes=True)


def ping(fork: str) -> Call[m.Pong]:
    return Call("POST", _at("forks", fork, "ping"), _as(m.Pong), repeatable=True)


def standby(fork: str) -> Call[m.Moved]:
    return Call("POST", _at("forks", fork, "standby"), _as(m.Moved), silence=MOVING)


def resume(fork: str) -> Call[m.Moved]:
    return Call("POST", _at("forks", fork, "resume"), _as(m.Moved), silence=MOVING)


def command(
    argv: Sequence[str], env: Mapping[str, str] | None, workdir: str | None, user: str | None, timeout: float | None
) -> dict[str, Any]:
    """A command, as the request and the WebSocket's first message have it."""
    if isinstance(argv, str):
        raise TypeError('a command is a list of words; for a shell line: ["sh", "-c", line]')
    body: dict[str, Any] = {"argv": list(argv), "env": dict(env or {})}
    if workdir:
        body["workdir"] = workdir
    if user:
        body["user"] = user
    if timeout is not None:
        body["timeout_ms"] = millis(timeout)
    return body


def exec_(fork: str, body: dict[str, Any], stdin: str | bytes | None, timeout: float | None) -> Call[m.ExecResult]:
    if stdin is not None:
        try:
            body["stdin"] = stdin if isinstance(stdin, str) else stdin.decode()
        except UnicodeDecodeError as error:
            raise ValueError("the input of exec is UTF-8; for other bytes use stream") from error
    # Without a timeout a command may be silent for as long as it likes.
    return Call("POST", _at("forks", fork, "exec"), _ran, headers=JSON, body=dump(body), silence=timeout)


def exec_path(fork: str) -> str:
    return _at("forks", fork, "exec")


def _ran(response: httpx.Response) -> m.ExecResult:
    body = _json(response)
    if isinstance(body, dict):
        for name in ("stdout", "stderr"):
            body[f"{name}_bytes"] = base64.b64decode(body.get(f"{name}_base64", ""))
    return decode(m.ExecResult, body)


def evaluate(fork: str, code: str, timeout: float) -> Call[m.Evaluation]:
    body = dump({"code": code, "timeout_ms": millis(timeout)})
    return Call("POST", _at("forks", fork, "eval"), _evaluated, headers=JSON, body=body, silence=timeout)


def _evaluated(response: httpx.Response) -> m.Evaluation:
    body = _json(response)
    if not isinstance(body, dict):
        raise ProtocolError("unexpected_answer", "the answer is no object")
    if isinstance(error := body.get("exception"), dict):
        texts = [
            source.get(name, "")
            for source, name in (
                (error, "kind"),
                (error, "message"),
                (error, "stack"),
                (body, "stdout"),
                (body, "stderr"),
            )
        ]
        raise EvalError(*map(str, texts))
    # `value` is null where NaN or Infinity is in it; Python's parser knows both. The text is the guest's and may be anything.
    try:
        body["value"] = json.loads(body.get("value_text") or "null")
    except (ValueError, RecursionError) as problem:
        raise ProtocolError("value_unreadable", "the fork's value is no JSON") from problem
    return decode(m.Evaluation, body)


def read_file(fork: str, path: str, archive: bool) -> Call[httpx.Response]:
    return _stream(_at("forks", fork, "files"), {"path": path, "format": "tar" if archive else "raw"}, {})


def write_file(
    fork: str, path: str, body: bytes | Callable[[], Iterator[bytes]], length: int | None, mode: int | None
) -> Call[None]:
    """``length`` of a single file; without it the body is an archive."""
    query = {"path": path, "format": "tar" if length is None else "raw"}
    headers = {"Content-Type": "application/octet-stream"}
    if length is not None:
        headers["Content-Length"] = str(length)
    if mode is not None:
        query["mode"] = f"{mode:04o}"
    return Call("PUT", _at("forks", fork, "files"), _nothing, query, headers, body, repeatable=True, silence=MOVING)


def logs(fork: str, follow: bool) -> Call[httpx.Response]:
    return _stream(_at("forks", fork, "logs"), {"follow": "true"} if follow else {}, EVENTS)


# The daemon


def jobs() -> Call[list[m.JobInfo]]:
    return _get("/v1/jobs", _list_of(m.JobInfo, "jobs"))


def job(id: str) -> Call[m.JobInfo]:  # noqa: A002 - the daemon's word
    return _get(_at("jobs", id), _as(m.JobInfo))


def job_events(id: str) -> Call[httpx.Response]:  # noqa: A002
    return _stream(_at("jobs", id, "events"), {}, EVENTS)


def events(after: int | None) -> Call[httpx.Response]:
    headers = EVENTS if after is None else {**EVENTS, "Last-Event-ID": str(after)}
    return _stream("/v1/events", {}, headers)


def pools() -> Call[list[m.Pool]]:
    return _get("/v1/pools", _list_of(m.Pool, "pools"))


def set_pool(tag: str, size: int, network: str | None) -> Call[list[m.Pool]]:
    body: dict[str, Any] = {"size": size} if network is None else {"size": size, "network": network}
    parse = _list_of(m.Pool, "pools")
    return Call("PUT", _at("pools", tag), parse, headers=JSON, body=dump(body), repeatable=True, silence=MAKING)


def tokens() -> Call[list[m.TokenInfo]]:
    return _get("/v1/tokens", _list_of(m.TokenInfo, "tokens"))


def create_token(name: str, scope: str, expires: int | None) -> Call[m.NewToken]:
    body: dict[str, Any] = {"name": name, "scope": scope}
    if expires is not None:
        body["expires_s"] = expires
    return Call("POST", "/v1/tokens", _as(m.NewToken), headers=JSON, body=dump(body))


def delete_token(id: str) -> Call[None]:  # noqa: A002
    return Call("DELETE", _at("tokens", id), _nothing, repeatable=True, removes=True)


def version() -> Call[m.Version]:
    return _get("/v1/version", _as(m.Version))


def metrics() -> Call[str]:
    return _get("/metrics", lambda response: response.text)
