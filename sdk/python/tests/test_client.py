"""The client itself: who may do what, events, jobs, what is sent again, and what is never shown."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from offshoot import (
    AsyncClient,
    Client,
    Conflict,
    ConnectionFailed,
    Event,
    File,
    Forbidden,
    InvalidRequest,
    Mailbox,
    NotFound,
    RateLimited,
    Retry,
    Secret,
    Unauthorized,
    WaitTimeout,
)
from offshoot._exchange import Call, Pause, exchange
from offshoot._sse import Parser

from .conftest import Daemon

SECRET = "hunter2"


def test_a_token_may_do_what_its_scope_says(client: Client, daemon: Daemon, bb: str, label: dict[str, str]) -> None:
    made = {scope: client.tokens.create(f"sdk-{scope}", scope, expires=600) for scope in ("read", "fork", "admin")}
    assert not [token for token in made.values() if token.token in repr(token)]
    assert {token.id for token in made.values()} <= {token.id for token in client.tokens.list()}
    with Client(daemon.url, token=made["read"].token) as reader:
        assert bb in [template.tag for template in reader.templates.list()]
        with pytest.raises(Forbidden) as refused:
            reader.fork(bb, labels=label)
        assert refused.value.status == 403
        assert list(reader.forks(labels=label)) == []
    with Client(daemon.url, token=Secret(made["fork"].token)) as forker:
        with forker.fork(bb, labels=label) as fork:
            assert fork.exec(["hostname"], check=True).stdout == f"{fork.name}\n"
            with fork.stream(["echo", "over TCP"]) as run:
                assert b"".join(chunk.data for chunk in run) == b"over TCP\n"
        with pytest.raises(Forbidden):
            forker.templates.delete(bb)
    with Client(daemon.url) as nobody, pytest.raises(Unauthorized):
        nobody.version()
    for token in made.values():
        client.tokens.delete(token.id)
    with Client(daemon.url, token=made["admin"].token) as revoked, pytest.raises(Unauthorized) as gone:
        revoked.version()
    assert made["admin"].token not in repr(gone.value) + str(gone.value) + repr(revoked)
    with pytest.raises(NotFound):
        client.tokens.delete(made["read"].id)


def test_events_are_seen_and_gone_on_with(client: Client, bb: str) -> None:
    def until(events: Iterator[Event], kind: str, subject: str) -> Event:
        return next(event for event in events if (event.kind, event.subject) == (kind, subject))

    with client.events() as events:
        with client.fork(bb) as fork:
            created = until(events, "fork.created", fork.id)
        removed = until(events, "fork.removed", fork.id)
        assert removed.id > created.id
    # Who was away is told what it missed.
    with client.events(after=created.id) as events:
        assert until(events, "fork.removed", fork.id) == removed
    assert list(events) == []


async def test_events_are_seen_by_tasks(aclient: AsyncClient, bb: str) -> None:
    async with aclient.events() as events:
        async with aclient.fork(bb) as fork:
            pass
        async with asyncio.timeout(60) if hasattr(asyncio, "timeout") else aclient:
            async for event in events:
                if (event.kind, event.subject) == ("fork.removed", fork.id):
                    break


def test_a_stream_of_events_that_breaks_is_made_again(daemon: Daemon, bb: str, tmp_path: Path) -> None:
    """Through a relay that can be cut."""
    relay = Relay(str(tmp_path / "relay"), daemon.socket)
    with Client(f"unix://{relay.path}", retry=Retry(first=0.05)) as client, Client(f"unix://{daemon.socket}") as direct:
        with client.events() as events:
            with direct.fork(bb) as one:
                assert next(event for event in events if event.subject == one.id).kind == "fork.created"
            relay.cut()
            with direct.fork(bb) as other:
                pass
            seen = []
            while (other.id, "fork.removed") not in seen:
                event = next(events)
                seen.append((event.subject, event.kind))
            # Nothing is missing, and nothing comes twice.
            wanted = [(one.id, "fork.removed"), (other.id, "fork.created"), (other.id, "fork.removed")]
            assert [found for found in seen if found in wanted] == wanted
        relay.close()
        with pytest.raises(ConnectionFailed) as gone:
            client.version()
        assert gone.value.code in ("unreachable", "connection_lost")


class Relay:
    """Hands connections on, until they are cut."""

    def __init__(self, path: str, to: str) -> None:
        self.path, self._to = path, to
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                one = self._listener.accept()[0]
            except OSError:
                return
            other = socket.socket(socket.AF_UNIX)
            other.connect(self._to)
            self._open += [one, other]
            for source, sink in ((one, other), (other, one)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)

    def cut(self) -> None:
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        Path(self.path).unlink()
        self.cut()


def test_jobs_tell_their_progress_and_their_failure(client: Client, bb: str) -> None:
    job = client.templates.verify(bb, count=2)
    steps = list(job.progress())
    assert (steps[-1].state, steps[-1].kind, steps[-1].template) == ("done", "verify", bb)
    assert client.jobs.get(job.id).wait()["passed"] is True
    assert job.id in [other.id for other in client.jobs.list()]
    with pytest.raises(WaitTimeout):
        client.templates.verify(bb, count=2).wait(0.01)
    with pytest.raises(Conflict) as exists:
        client.templates.build("busybox", bb)
    assert exists.value.code == "template_exists"
    with pytest.raises(NotFound):
        client.templates.build("no-such-recipe", "sdk-none")
    with pytest.raises(NotFound):
        client.jobs.get("0" * 16)


def test_pools_are_kept_and_ended(client: Client, bb: str) -> None:
    try:
        assert [(pool.size, pool.ready) for pool in client.pools.set(bb, 1) if pool.template == bb] == [(1, 1)]
        with client.forking(bb, n=2) as forks:
            assert len({fork.id for fork in forks}) == 2
    finally:
        assert bb not in [pool.template for pool in client.pools.set(bb, 0)]
    assert client.version().api == "v1"
    assert "# EOF" in client.metrics()


def test_secrets_are_not_shown() -> None:
    secret = Secret(SECRET)
    shown = [
        repr(secret),
        f"{secret}",
        "%s" % secret,  # noqa: UP031
        repr(Mailbox("m", {"k": SECRET}, token=SECRET)),
        repr(File(SECRET)),
        repr(Client("http://127.0.0.1:1", token=SECRET)),
    ]
    assert not [text for text in shown if SECRET in text]
    assert secret == Secret(SECRET)
    assert secret != Secret("other")
    assert secret.reveal() == SECRET


@pytest.mark.parametrize(
    "host",
    ["ftp://x", "unix://relative", "https://user:pass@host", "https://host/path", "localhost", "http://example.com:1"],
)
def test_addresses_that_are_none_or_would_give_the_token_away_are_refused(host: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        Client(host, token=SECRET)
    assert SECRET not in str(refused.value)


def test_the_environment_says_where_the_daemon_is(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFSHOOT_HOST", f"unix://{daemon.socket}")
    with Client() as client:
        assert client.version().api == "v1"
    monkeypatch.delenv("OFFSHOOT_HOST")
    monkeypatch.setenv("OFFSHOOT_STATE_DIR", daemon.environment["OFFSHOOT_STATE_DIR"])
    with Client() as client:
        assert client.version().api == "v1"
    monkeypatch.setenv("OFFSHOOT_STATE_DIR", "/no/such")
    with Client(retry=Retry(attempts=2, first=0.01)) as client, pytest.raises(ConnectionFailed) as none:
        client.version()
    assert (none.value.code, none.value.next) == ("unreachable", "offshoot serve")


def test_names_do_not_leave_their_place_in_a_path(client: Client) -> None:
    with pytest.raises((NotFound, InvalidRequest)):
        client.get_fork("../templates")
    for name in ("", "..", "."):
        with pytest.raises(ValueError, match="name"):
            client.get_fork(name)


# What is sent again: the rules, without a daemon.


def sent(done: list[object]) -> int:
    return done.count("sent")


def steps(call: Call[None], answers: list[httpx.Response | Exception], retry: Retry) -> tuple[list[object], object]:
    """What is done for these answers, and what comes of it."""
    done: list[object] = []
    work = exchange(call, retry)
    try:
        step = next(work)
        while True:
            if isinstance(step, Pause):
                done.append(step.seconds)
                step = next(work)
                continue
            done.append("sent")
            answer = answers.pop(0)
            step = work.throw(answer) if isinstance(answer, Exception) else work.send(answer)
    except StopIteration as end:
        return done, end.value.status_code
    except Exception as error:
        return done, type(error)


def answer(status: int, code: str = "", after: str | None = None) -> httpx.Response:
    headers = {} if after is None else {"Retry-After": after}
    return httpx.Response(status, headers=headers, json={"code": code, "status": status, "detail": "d"})


def call(**rules: bool) -> Call[None]:
    parse: Callable[[httpx.Response], None] = lambda _: None  # noqa: E731
    return Call("POST", "/", parse, **rules)  # type: ignore[arg-type]


def test_what_was_not_done_is_sent_again_and_nothing_else() -> None:
    retry = Retry(attempts=3, first=0.001, longest=5)
    refused, broken = httpx.ConnectError("refused"), httpx.ReadError("broken")
    done, end = steps(call(), [refused, refused, answer(200)], retry)
    assert (sent(done), end) == (3, 200)
    done, end = steps(call(), [refused] * 5, retry)
    assert (sent(done), end) == (3, ConnectionFailed)
    done, end = steps(call(), [broken, answer(200)], retry)
    assert (sent(done), end) == (1, ConnectionFailed)
    done, end = steps(call(repeatable=True), [broken, answer(200)], retry)
    assert (sent(done), end) == (2, 200)
    done, end = steps(call(), [answer(429, "too_many_requests", "2"), answer(201)], retry)
    assert (done, end) == (["sent", 2.0, "sent"], 201)
    done, end = steps(call(), [answer(429, "too_many_requests", "60")], retry)
    assert (done, end) == (["sent"], RateLimited)
    assert steps(call(), [answer(503, "interrupted")], retry)[0] == ["sent"]
    assert steps(call(), [answer(409, "name_conflict")], retry) == (["sent"], Conflict)
    waiting: list[httpx.Response | Exception] = [answer(409, "idempotency_in_progress") for _ in range(9)]
    done, end = steps(call(), [*waiting, answer(201)], retry)
    assert (sent(done), end) == (10, 201)
    done, end = steps(call(repeatable=True, removes=True), [broken, answer(404, "fork_not_found")], retry)
    assert (sent(done), end) == (2, 404)
    assert steps(call(removes=True), [answer(404, "fork_not_found")], retry)[1] is NotFound


def test_events_are_put_together_from_any_parts() -> None:
    text = b'id: 7\r\nevent: fork.created\r\ndata: {"a":\r\ndata: "\xc3\xa4"}\r\n\r\n: alive\n\nevent: x\ndata: 1\n\n'
    for size in (1, 3, 1000):
        parser = Parser()
        found = [event for at in range(0, len(text), size) for event in parser.feed(text[at : at + size])]
        assert [(event.kind, event.id) for event in found] == [("fork.created", "7"), ("x", None)]
        assert found[0].json() == {"a": "ä"}
