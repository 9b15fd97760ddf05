"""Forks: each is itself, whoever makes them and however they end."""

from __future__ import annotations

import asyncio

import pytest

from offshoot import (
    AsyncClient,
    Child,
    Client,
    Conflict,
    InvalidRequest,
    Limits,
    Mailbox,
    NotFound,
    OffshootError,
    Secret,
)

FACTS = ["sh", "-c", "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname; od -An -N16 -tx1 /dev/urandom"]


def running(client: Client, labels: dict[str, str]) -> list[str]:
    return [fork.id for fork in client.forks(labels=labels)]


def test_two_forks_differ_from_each_other_and_from_the_template(client: Client, py: str) -> None:
    with client.forking(py, n=2) as forks:
        seen = [fork.exec(FACTS, check=True).stdout.split("\n") for fork in forks]
        for one, other in zip(*seen, strict=True):
            assert one != other or one == ""
        for fork, facts in zip(forks, seen, strict=True):
            info = fork.inspect()
            assert facts[0].replace("-", "") == info.machine_id.replace("-", "")
            assert facts[1:3] == [info.boot_id, fork.name]
        # The same program in both, the template's randomness in neither; what was warm is shared.
        assert forks[0].eval("random.random()") != forks[1].eval("random.random()")
        assert {fork.eval("sys.version") for fork in forks} == {forks[0].eval("sys.version")}
    verdict = client.templates.verify(py, count=2).wait(300)
    assert verdict.passed
    assert verdict.rows[0].subject == "template"
    assert verdict.shared == []
    assert len(verdict.rows) == 3


def test_children_are_given_what_all_are_given_and_their_own(client: Client, bb: str) -> None:
    forks = client.fork(
        bb,
        children=[
            Child(env={"B": "2"}, secrets={"KEY": Secret("one")}),
            Child(name="sdk-other", files={"/etc/x": b"\xff\x00"}),
        ],
        name="sdk-child",
        env={"A": "1", "B": "1"},
        secrets={"KEY": "all"},
        files={"/etc/y": "text"},
        limits=Limits(pids=200),
    )
    with forks:
        one, two = forks
        assert (one.name, two.name) == ("sdk-child-1", "sdk-other")
        told = ["sh", "-c", "echo $A $B; cat /run/offshoot/secrets/KEY /etc/y"]
        assert one.exec(told, check=True).stdout == "1 2\nonetext"
        assert two.exec(told, check=True).stdout == "1 1\nalltext"
        assert two.read_file("/etc/x") == b"\xff\x00"
        with pytest.raises(OffshootError, match=r"/etc/x"):
            one.read_file("/etc/x")
        assert one.inspect().secrets == ["KEY"]
        with pytest.raises(Conflict) as taken:
            client.fork(bb, name="sdk-other")
        assert taken.value.code == "name_conflict"


def test_what_is_wrong_is_refused_before_any_work(client: Client, bb: str, label: dict[str, str]) -> None:
    with pytest.raises(NotFound) as unknown:
        client.fork(bb, n=2, labels=label, mailboxes=[Mailbox("no:such", {"key": "hunter2"}, token=Secret("hunter2"))])
    assert (unknown.value.code, unknown.value.field) == ("mailbox_not_found", "mailboxes")
    assert "hunter2" not in repr(unknown.value) + str(unknown.value)
    with pytest.raises(InvalidRequest) as wrong:
        client.fork(bb, labels=label, children=[Child(), Child(env={"a b": ""})])
    assert wrong.value.field == "children[1].env"
    with pytest.raises(NotFound, match="template_not_found"):
        client.fork("no-such-template", labels=label)
    with pytest.raises(TypeError, match="colour"):
        client.fork(bb, colour="red")  # type: ignore[call-overload]
    assert running(client, label) == []
    assert client.templates.mailboxes(bb).mailboxes == []


# A program of the guest with a mailbox: what comes is kept, and acknowledged unless it says otherwise.
PLANTED = """
import json, socket, threading
heard = []
agent = socket.socket(socket.AF_UNIX)
agent.connect("/run/offshoot/agent.sock")
lines = agent.makefile("rw")
def say(what): lines.write(json.dumps(what) + chr(10)); lines.flush()
say({"op": "plant", "name": "sdk:config", "capacity": 4096, "token": "let-me-in"})
answer = json.loads(lines.readline())
def serve():
    for line in lines:
        event = json.loads(line)
        if event.get("event") == "filled":
            heard.append(event["payload"])
            say({"op": "fail", "reason": "as asked"} if event["payload"].get("fail") else {"op": "ack"})
threading.Thread(target=serve, daemon=True).start()
answer
"""


def test_a_payload_reaches_the_program_of_each_child_and_nobody_else(
    client: Client, py: str, label: dict[str, str]
) -> None:
    def letter(payload: dict[str, object], token: str = "let-me-in") -> list[Mailbox]:
        return [Mailbox("sdk:config", payload, token=Secret(token), wait_for_ack=True, ack_timeout=30)]

    with client.fork(py, labels=label) as source:
        assert source.eval(PLANTED) == {"ok": True}
        children = [Child(mailboxes=letter({"child": number, "half": 0.5})) for number in range(2)]
        with source.fork(children=children, labels=label) as forks:
            for number, fork in enumerate(forks):
                assert fork.eval("heard") == [{"child": number, "half": 0.5}]
                (report,) = fork.inspect().mailboxes
                assert (report.name, report.acknowledged) == ("sdk:config", True)
        assert source.eval("heard") == [], "the source was sent nothing"
        before = len(running(client, label))
        for wrong, code in [
            (letter({}, "let-me-out"), "mailbox_token_mismatch"),
            (letter({"fail": True}), "identity_refused"),
        ]:
            with pytest.raises(OffshootError) as refused:
                source.fork(mailboxes=wrong, labels=label)
            assert refused.value.code == code
            assert "let-me" not in repr(refused.value) + str(refused.value)
        assert len(running(client, label)) == before, "a fork that does not acknowledge is destroyed"


def test_all_or_nothing_unless_asked_otherwise(client: Client, bb: str, label: dict[str, str]) -> None:
    twice = [Child(name="sdk-taken"), Child(name="sdk-free")]
    with client.fork(bb, name="sdk-taken"):
        with pytest.raises(Conflict) as failed:
            client.fork(bb, children=twice, labels=label)
        assert failed.value.code == "name_conflict"
        assert running(client, label) == []
        with client.fork(bb, children=twice, labels=label, all_or_nothing=False) as forks:
            assert [fork.name for fork in forks] == ["sdk-free"]
            ((index, error),) = forks.failed
            assert (index, error.code) == (0, "name_conflict")


def test_the_same_key_gives_the_same_forks(client: Client, bb: str, label: dict[str, str]) -> None:
    with client.fork(bb, n=2, labels=label, idempotency_key=label["test"]) as forks:
        again = client.fork(bb, n=2, labels=label, idempotency_key=label["test"])
        assert [fork.id for fork in again] == [fork.id for fork in forks]
        assert len(running(client, label)) == 2
        with pytest.raises(Conflict, match="idempotency_key_reused"):
            client.fork(bb, n=1, labels=label, idempotency_key=label["test"])
        with client.fork(bb, labels=label) as other:
            assert other.id not in [fork.id for fork in forks]


def test_blocks_clean_up_also_after_an_exception(client: Client, bb: str, label: dict[str, str]) -> None:
    with pytest.raises(ZeroDivisionError), client.forking(bb, n=2, labels=label) as forks:
        # One that is gone already is no failure.
        forks[0].kill()
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), client.fork(bb, labels=label):
        raise ZeroDivisionError
    assert running(client, label) == []
    with pytest.raises(NotFound):
        forks[1].ping()
    with pytest.raises(NotFound):
        forks[1].kill()


def test_lists_come_in_pages_and_forks_are_found_by_name(client: Client, bb: str, label: dict[str, str]) -> None:
    with client.fork(bb, n=3, name="sdk-page", labels=label) as forks:
        found = list(client.forks(labels=label, template=bb, state="running", page=1))
        assert sorted(fork.id for fork in found) == sorted(fork.id for fork in forks)
        assert list(client.forks(labels=label, state="standby")) == []
        by_name = client.get_fork("sdk-page-2")
        assert by_name.id == forks[1].id
        assert client.get_fork(by_name.id[:8]).name == "sdk-page-2"
        assert by_name.ping().fork == by_name.id


def test_standby_keeps_what_was_in_memory(client: Client, py: str) -> None:
    with client.fork(py, n=2) as forks:
        one, two = forks
        for number, fork in enumerate(forks):
            fork.exec(["sh", "-c", f"echo {number} > /tmp/kept"], check=True)
            fork.eval(f"kept = {number}")
        moved = one.standby()
        assert (one.state, moved.fork.state) == ("standby", "standby")
        assert moved.data_bytes
        with pytest.raises(Conflict) as asleep:
            one.eval("kept")
        assert asleep.value.code == "fork_in_standby"
        one.resume()
        assert one.state == "running"
        assert [fork.eval("kept") for fork in forks] == [0, 1]
        assert one.exec(["cat", "/tmp/kept"], check=True).stdout == "0\n"
        assert one.eval("random.random()") != two.eval("random.random()")
        with pytest.raises(Conflict, match="fork_runs"):
            one.resume()


def test_a_fork_of_a_fork_goes_on_from_where_it_was(client: Client, py: str) -> None:
    with client.fork(py) as parent:
        parent.eval("found = [1]")
        with parent.fork(n=2) as children:
            parent.eval("found.append('parent')")
            for number, child in enumerate(children):
                child.eval(f"found.append({number})")
            assert [child.eval("found") for child in children] == [[1, 0], [1, 1]]
            assert parent.eval("found") == [1, "parent"]
            every = [parent, *children]
            assert len({fork.inspect().machine_id for fork in every}) == 3
            assert len({fork.eval("random.random()") for fork in every}) == 3
            assert {child.inspect().source for child in children} <= {parent.id, parent.name}


async def test_async_forks_are_cleaned_up_as_well(aclient: AsyncClient, bb: str, label: dict[str, str]) -> None:
    with pytest.raises(ZeroDivisionError):
        async with aclient.fork(bb, n=2, labels=label) as forks:
            seen = [(await fork.exec(FACTS, check=True)).stdout for fork in forks]
            assert seen[0] != seen[1]
            raise ZeroDivisionError
    assert [fork async for fork in aclient.forks(labels=label)] == []
    fork = await aclient.fork(bb, labels=label)
    async with fork:
        assert (await aclient.get_fork(fork.id)).name == fork.name
        assert (await fork.ping()).fork == fork.id
        async with fork.fork(labels=label) as child:
            assert (await child.inspect()).source in (fork.id, fork.name)
        await fork.standby()
        await fork.resume()
        assert (await fork.exec(["hostname"], check=True)).stdout == f"{fork.name}\n"
    assert [fork async for fork in aclient.forks(labels=label)] == []


async def test_a_task_that_is_cancelled_leaves_no_forks(aclient: AsyncClient, bb: str, label: dict[str, str]) -> None:
    async def make() -> None:
        async with aclient.forking(bb, n=2, labels=label):
            await asyncio.sleep(60)

    # Whenever that is: before it is asked for, while it is being made, and while it is used.
    for delay in (0, 0.05, 0.2):
        task = asyncio.create_task(make())
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [fork async for fork in aclient.forks(labels=label)] == []
