"""Files and folders, both ways; what a fork sends counts as hostile."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from offshoot import AsyncClient, Client, Fork, HostileArchive, OffshootError
from offshoot._tar import pack, unpack

BIG = 8 << 20


@pytest.fixture(scope="module")
def fork(client: Client, py: str) -> Iterator[Fork]:
    with client.fork(py) as fork:
        yield fork


def test_a_file_goes_in_and_comes_back(fork: Fork, tmp_path: Path) -> None:
    fork.write_file("/tmp/a", "text\n", mode=0o600)
    assert fork.exec(["stat", "-c", "%a %s", "/tmp/a"], check=True).stdout == "600 5\n"
    assert fork.read_file("/tmp/a") == b"text\n"
    local = tmp_path / "b"
    local.write_bytes(b"\x00\xff")
    fork.write_file("/tmp/b", local)
    fork.write_file("/tmp/c", io.BytesIO(b"skipped, sent"))
    fork.write_file("/tmp/empty", b"")
    assert [fork.read_file(f"/tmp/{name}") for name in ("b", "c", "empty")] == [b"\x00\xff", b"skipped, sent", b""]
    for path in ("/no/such", "/etc"):
        with pytest.raises(OffshootError):
            fork.read_file(path)
    with pytest.raises(OffshootError):
        fork.write_file("/no/such/folder/file", b"")


def test_a_big_file_is_the_same_after_both_ways(client: Client, bb: str, tmp_path: Path) -> None:
    content = os.urandom(BIG)
    local = tmp_path / "big"
    local.write_bytes(content)
    with client.fork(bb, n=2) as forks:
        one, two = forks
        one.write_file("/tmp/big", local)
        assert one.read_file("/tmp/big") == content
        with pytest.raises(OffshootError):
            two.read_file("/tmp/big")
        assert one.download("/tmp/big", tmp_path / "back").read_bytes() == content
        with pytest.raises(HostileArchive, match="limit"):
            one.download("/tmp/big", tmp_path / "limited", limit=BIG // 2)


def folder(at: Path) -> Path:
    (at / "deep" / "er").mkdir(parents=True)
    (at / "deep" / "er" / "file").write_text("in it")
    (at / "empty").mkdir()
    (at / ("long" * 40)).write_bytes(b"x" * 1000)
    (at / "program").write_text("#!/bin/sh\n")
    (at / "program").chmod(0o755)
    (at / "link").symlink_to("deep/er/file")
    return at


def listed(at: Path) -> dict[str, str | bytes | None]:
    def content(path: Path) -> str | bytes | None:
        return str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None

    return {str(path.relative_to(at)): content(path) for path in at.rglob("*")}


def test_a_folder_goes_in_and_comes_back(fork: Fork, tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    fork.upload(source, "/tmp/copied")
    # Into a folder that is there under its own name, as `cp -r`.
    fork.upload(source, "/tmp")
    assert fork.exec(["cat", "/tmp/source/link"], check=True).stdout == "in it"
    fork.exec(["/tmp/copied/program"], check=True)
    back = fork.download("/tmp/copied", tmp_path / "back")
    assert back == tmp_path / "back"
    assert listed(back) == listed(source)
    assert os.access(back / "program", os.X_OK)
    assert fork.download("/tmp/copied/program", tmp_path) == tmp_path / "program"
    with pytest.raises(FileNotFoundError):
        fork.upload(tmp_path / "none", "/tmp")
    with pytest.raises(OffshootError):
        fork.download("/no/such", tmp_path)


def test_a_link_out_of_a_folder_is_refused(fork: Fork, tmp_path: Path) -> None:
    fork.exec(["sh", "-c", "mkdir /tmp/evil && ln -s ../../.. /tmp/evil/out && ln -s /etc /tmp/evil/etc"], check=True)
    with pytest.raises(HostileArchive):
        fork.download("/tmp/evil", tmp_path / "evil")
    assert not (tmp_path / "evil" / "etc").exists()


Entry = tuple[str, bytes, str]


def archive(*entries: Entry, end: bool = True) -> Iterator[bytes]:
    for name, kind, extra in entries:
        info = tarfile.TarInfo(name)
        info.type = kind
        content = extra.encode() if kind == tarfile.REGTYPE else b""
        info.linkname = "" if content else extra
        info.size = len(content)
        yield info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)
    if end:
        yield bytes(1024)


FOLDER: Entry = ("top", tarfile.DIRTYPE, "")


@pytest.mark.parametrize(
    "entries",
    [
        [("../out", tarfile.REGTYPE, "x")],
        [FOLDER, ("top/../../out", tarfile.REGTYPE, "x")],
        [FOLDER, ("other", tarfile.REGTYPE, "x")],
        [FOLDER, ("top/l", tarfile.SYMTYPE, ".."), ("top/l/out", tarfile.REGTYPE, "x")],
        [FOLDER, ("top/l", tarfile.SYMTYPE, "/etc")],
        [FOLDER, ("top/h", tarfile.LNKTYPE, "/etc/passwd")],
        [FOLDER, ("top/dev", tarfile.CHRTYPE, "")],
        [FOLDER, ("top/pipe", tarfile.FIFOTYPE, "")],
        [("top", tarfile.SYMTYPE, "/etc")],
        [("top", tarfile.REGTYPE, "x"), ("top/out", tarfile.REGTYPE, "x")],
        [],
    ],
)
def test_hostile_archives_write_nothing_outside(entries: list[Entry], tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    parts = archive(*entries)
    with pytest.raises(HostileArchive):
        unpack(lambda: next(parts, b""), inner / "to")
    assert {path.name for path in tmp_path.rglob("*")} <= {"inner", "to", "l"}


def test_an_archive_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    cut = archive(FOLDER, ("top/a", tarfile.REGTYPE, "x"), end=False)
    with pytest.raises(HostileArchive, match="cut off"):
        unpack(lambda: next(cut, b""), tmp_path / "cut")
    whole = pack(folder(tmp_path / "source"))
    assert listed(unpack(lambda: next(whole, b""), tmp_path / "whole")) == listed(tmp_path / "source")


async def test_async_does_the_same(aclient: AsyncClient, py: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    async with aclient.fork(py, n=2) as forks:
        one, two = forks
        await one.upload(source, "/tmp/copied")
        back = await one.download("/tmp/copied", tmp_path / "back")
        assert listed(back) == listed(source)
        await two.write_file("/tmp/a", source / "program")
        assert await two.read_file("/tmp/a") == b"#!/bin/sh\n"
        with pytest.raises(OffshootError):
            await one.read_file("/tmp/a")
