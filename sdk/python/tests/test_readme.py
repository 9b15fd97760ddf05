"""The examples of the README run as they stand."""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path

import pytest

from .conftest import Daemon

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number: int, daemon: Daemon, py: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFSHOOT_HOST", f"unix://{daemon.socket}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    example = EXAMPLES[number].replace('"py"', repr(py))
    names: dict[str, object] = {}
    exec(compile(example, f"README example {number + 1}", "exec"), names)
    if inspect.iscoroutinefunction(main := names.get("main")):
        asyncio.run(main())


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
