"""What is done inside of forks: commands, code, logs."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator

import pytest

from offshoot import AsyncClient, Chunk, Client, EvalError, ExecError, ExecResult, Fork, InvalidRequest


@pytest.fixture(scope="module")
def fork(client: Client, py: str) -> Iterator[Fork]:
    with client.fork(py) as fork:
        yield fork


def test_exec_gives_code_and_output(fork: Fork) -> None:
    result = fork.exec(["sh", "-c", "cat; echo $X >&2; pwd; exit 3"], env={"X": "e"}, workdir="/tmp", stdin="in\n")
    assert (result.code, result.stdout, result.stderr) == (3, "in\n/tmp\n", "e\n")
    assert fork.exec(["printf", r"\377"]).stdout_bytes == b"\xff"
    with pytest.raises(ExecError) as failed:
        fork.exec(["sh", "-c", "exit 4 # hunter2"], check=True)
    assert isinstance(failed.value.result, ExecResult)
    assert (failed.value.result.code, "hunter2" in str(failed.value)) == (4, False)
    assert fork.exec(["/no/such"]).code == 127
    assert fork.exec(["sleep", "60"], timeout=0.5).timed_out
    with pytest.raises(InvalidRequest):
        fork.exec([])
    with pytest.raises(TypeError):
        fork.exec("ls -l")


def test_a_stream_takes_input_and_signals(fork: Fork) -> None:
    script = (
        "trap 'echo got it; exit 7' TERM; echo ready >&2; while read line; do echo \"<$line>\"; done; sleep 60 & wait"
    )
    with fork.stream(["sh", "-c", script]) as run:
        assert next(run) == Chunk("stderr", b"ready\n")
        run.write("one\n")
        run.write(b"two\n")
        run.close_stdin()
        output = b""
        while b"<two>" not in output:
            output += next(run).data
        run.signal(signal.SIGTERM)
        output += b"".join(chunk.data for chunk in run)
    assert output == b"<one>\n<two>\ngot it\n"
    assert run.exit is not None
    assert run.exit.code == 7


def test_a_terminal_has_a_size_that_changes(fork: Fork) -> None:
    with fork.stream(["sh", "-c", "stty size; read x; stty size"], tty=(10, 20)) as run:
        seen = b""
        while b"10 20" not in seen:
            seen += next(run).data
        run.resize(30, 40)
        run.write("\n")
        seen += b"".join(chunk.data for chunk in run)
    assert b"30 40" in seen
    assert run.wait(check=True).code == 0


def test_a_stream_that_is_left_ends_its_command(fork: Fork) -> None:
    with fork.stream(["sh", "-c", "echo $$; exec sleep 1000"]) as run:
        pid = int(next(run).data)
    end = ["sh", "-c", f"for i in $(seq 100); do [ -d /proc/{pid} ] || exit 0; sleep 0.1; done; exit 1"]
    fork.exec(end, check=True)


def test_much_output_comes_whole(fork: Fork) -> None:
    with fork.stream(["sh", "-c", "head -c 3000000 /dev/zero; printf x >&2"]) as run:
        sizes = {"stdout": 0, "stderr": 0}
        for chunk in run:
            sizes[chunk.source] += len(chunk.data)
    assert sizes == {"stdout": 3000000, "stderr": 1}


def test_eval_keeps_what_json_has_no_word_for(fork: Fork) -> None:
    assert math.isnan(fork.eval("float('nan')"))
    assert fork.eval("[1, float('inf'), {'a': -float('inf')}]") == [1, math.inf, {"a": -math.inf}]
    assert fork.eval("x = 5") is None
    done = fork.evaluate("print('said'); (1, 'a')")
    assert (done.value, done.repr, done.stdout) == ([1, "a"], "(1, 'a')", "said\n")
    with pytest.raises(EvalError) as raised:
        fork.eval("print('before')\ndef f(): return 1 / 0\nf()")
    error = raised.value
    assert (error.kind, error.stdout, error.code) == ("exception", "before\n", "exception")
    assert "ZeroDivisionError" in str(error)
    assert "in f" in error.stack
    with pytest.raises(EvalError) as slow:
        fork.eval("import time; time.sleep(60)", timeout=1)
    assert slow.value.code == "eval_timeout"


def test_eval_needs_a_runtime(client: Client, bb: str) -> None:
    with client.fork(bb) as fork, pytest.raises(EvalError) as none:
        fork.eval("1")
    assert none.value.code == "no_runtime"


def test_logs_come_and_go_on(client: Client, bb: str) -> None:
    # The recipe's service writes a line now and then.
    with client.fork(bb) as fork:
        logs = fork.logs(follow=True)
        assert next(logs).data
        assert all(chunk.source and chunk.data for chunk in fork.logs())


async def test_async_does_the_same(aclient: AsyncClient, py: str) -> None:
    async with aclient.fork(py, n=2) as forks:
        one, two = forks
        assert math.isnan(await one.eval("float('nan')"))
        assert await one.eval("random.random()") != await two.eval("random.random()")
        with pytest.raises(EvalError):
            await one.eval("1 / 0")
        with pytest.raises(ExecError):
            await one.exec(["false"], check=True)
        async with one.stream(["cat"]) as run:
            await run.write("hello")
            await run.close_stdin()
            assert b"".join([chunk.data async for chunk in run]) == b"hello"
            assert (await run.wait(check=True)).code == 0
        async with two.stream(["sleep", "60"]) as run:
            await run.signal(signal.SIGKILL)
            assert (await run.wait()).code == 137
        assert all([chunk.source async for chunk in one.logs()])
