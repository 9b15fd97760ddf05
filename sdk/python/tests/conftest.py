"""A real daemon with real guests. Templates are built through it once and kept in OFFSHOOT_TEST_DIR, if that is set."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from offshoot import AsyncClient, Client

# Building boots a guest, which takes a minute on a busy machine without KVM.
BUILD_LIMIT = 600


@dataclass(frozen=True)
class Daemon:
    """One `offshoot serve`, and where it is."""

    socket: str
    url: str
    environment: dict[str, str]

    def offshoot(self, *arguments: str) -> str:
        """Runs the command line on the same directories."""
        command = [program(), *arguments]
        return subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, timeout=120
        ).stdout


def program() -> str:
    found = shutil.which("offshoot")
    assert found, "put the folder of the programs under test into PATH"
    return found


@pytest.fixture(scope="session")
def daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="offshoot-sdk-") as temporary:
        environment = dict(os.environ)
        for name in ("OFFSHOOT_HOST", "OFFSHOOT_TOKEN", "OFFSHOOT_FAULT"):
            environment.pop(name, None)
        data = os.environ.get("OFFSHOOT_TEST_DATA_DIR") or f"{temporary}/data"
        environment |= {"OFFSHOOT_DATA_DIR": data, "OFFSHOOT_STATE_DIR": f"{temporary}/state"}
        log = Path(temporary) / "serve.log"
        with log.open("wb") as output:
            command = [program(), "serve", "--listen", "127.0.0.1:0", "--grace", "2"]
            process = subprocess.Popen(command, env=environment, stderr=output, stdout=output)
        try:
            socket = f"{temporary}/state/api/offshoot.sock"
            yield Daemon(socket, wait_until_ready(process, socket, log), environment)
        finally:
            process.terminate()
            process.wait(60)
            subprocess.run([program(), "kill", "--all", "--quiet"], env=environment, timeout=120, check=False)


def wait_until_ready(process: subprocess.Popen[bytes], socket: str, log: Path) -> str:
    """The URL it listens on besides its socket."""
    end = time.monotonic() + 60
    # There is nothing to wait on: the daemon says it in its log.
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(rf"listening on {re.escape(socket)} and (127\.0\.0\.1:\d+)", log.read_text()):
            return f"http://{found[1]}"
        time.sleep(0.05)
    raise RuntimeError(f"the daemon does not listen: {log.read_text()}")


@pytest.fixture(scope="session")
def client(daemon: Daemon) -> Iterator[Client]:
    with Client(f"unix://{daemon.socket}") as client:
        yield client


@pytest_asyncio.fixture
async def aclient(daemon: Daemon) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"unix://{daemon.socket}") as client:
        yield client


def ensure(client: Client, recipe: str) -> str:
    # Which programs it was built by is part of its name: others make other templates.
    agent = Path(program()).with_name("offshoot-agent").stat()
    tag = f"sdk-{recipe}-{agent.st_size}-{int(agent.st_mtime)}"
    tags = [template.tag for template in client.templates.list()]
    if tag not in tags:
        for old in tags:
            if old.startswith(f"sdk-{recipe}-"):
                client.templates.delete(old)
        client.templates.build(recipe, tag).wait(BUILD_LIMIT)
    return tag


@pytest.fixture(scope="session")
def py(client: Client) -> str:
    """The tag of a template with a warm Python."""
    return ensure(client, "python")


@pytest.fixture(scope="session")
def bb(client: Client) -> str:
    """The tag of a small template without a runtime."""
    return ensure(client, "busybox")


@pytest.fixture
def label() -> dict[str, str]:
    """A label of this test alone."""
    return {"test": uuid.uuid4().hex}
