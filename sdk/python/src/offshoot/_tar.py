"""Files and folders as tar streams. One that comes from a fork is hostile.

What is unpacked is a file, a folder or a link, and lies below the destination: the ``data`` filter of tarfile sees to it, with the copied
folder itself as the limit.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ._errors import HostileArchive

BLOCK = 512
PART = 256 << 10


def pack(source: Path) -> Iterator[bytes]:
    """The archive of a file or a folder, its entries named from the last component on. Links are packed as links."""
    top = source.resolve(strict=True)
    name = top.name or "root"
    yield from _entry(top, name)
    if top.is_dir():
        for folder, folders, files in os.walk(top, followlinks=False):
            for entry in sorted(folders + files):
                path = Path(folder) / entry
                yield from _entry(path, f"{name}/{path.relative_to(top).as_posix()}")
    yield bytes(2 * BLOCK)


def _entry(path: Path, name: str) -> Iterator[bytes]:
    about = path.lstat()
    info = tarfile.TarInfo(name)
    info.mode, info.mtime = stat.S_IMODE(about.st_mode), int(about.st_mtime)
    if stat.S_ISDIR(about.st_mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(about.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
    elif stat.S_ISREG(about.st_mode):
        with path.open("rb") as file:
            # Of the file that was opened.
            info.size = os.fstat(file.fileno()).st_size
            yield info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape")
            yield from exactly(file, info.size)
        yield bytes(-info.size % BLOCK)
        return
    else:
        raise ValueError(f"{path} is no file, folder or link")
    yield info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape")


def exactly(file: BinaryIO | io.BufferedIOBase, size: int) -> Iterator[bytes]:
    """``size`` bytes of a file, also if it grows meanwhile; one that shrank is an error."""
    while size:
        part = file.read(min(PART, size))
        if not part:
            raise OSError("the file became shorter while it was read")
        size -= len(part)
        yield part


class Reader(io.RawIOBase):
    """A file over the parts of an answer: ``more`` gives the next one, and nothing at the end."""

    def __init__(self, more: Callable[[], bytes], limit: int | None) -> None:
        super().__init__()
        self._more = more
        self._rest = b""
        self._left = limit
        # The end of the archive, to know that it is whole.
        self._tail = b""

    def read(self, size: int | None = -1) -> bytes:
        """At most ``size`` bytes."""
        wanted = PART if size is None or size < 0 else size
        while not self._rest:
            self._rest = self._more()
            if not self._rest:
                return b""
            if self._left is not None and (left := self._left - len(self._rest)) < 0:
                raise HostileArchive("hostile_archive", "the archive is larger than the limit that was given")
            if self._left is not None:
                self._left = left
            self._tail = (self._tail + self._rest)[-2 * BLOCK :]
        part, self._rest = self._rest[:wanted], self._rest[wanted:]
        return part

    def finish(self) -> None:
        """Reads what is left; an archive without its end is not whole."""
        while self.read():
            pass
        if self._tail != bytes(2 * BLOCK):
            raise HostileArchive("hostile_archive", "the archive was cut off")


def unpack(more: Callable[[], bytes], to: Path, limit: int | None = None) -> Path:
    """Unpacks as ``cp -r`` does: into the folder ``to`` under its own name, else as ``to``. Gives the path of what was copied."""
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError("this Python's tarfile has no data filter; use 3.10.12, 3.11.4 or newer")
    reader = Reader(more, limit)
    target: Path | None = None
    try:
        with tarfile.open(fileobj=reader, mode="r|") as archive:
            for member in archive:
                first, _, rest = member.name.strip("/").partition("/")
                if first in ("", ".", "..") or "\0" in member.name:
                    raise _hostile("an entry without a name")
                if target is None:
                    target = to / first if to.is_dir() else to
                    root = first
                    _begin(archive, member, target)
                elif first != root or not rest:
                    raise _hostile("a second thing besides the one that was asked for")
                else:
                    _below(archive, member, rest, target)
        reader.finish()
    except tarfile.FilterError as error:
        raise _hostile(f"what is refused: {error}") from error
    except tarfile.TarError as error:
        raise HostileArchive("hostile_archive", f"the sandbox sent no proper archive: {error}") from error
    if target is None:
        raise HostileArchive("hostile_archive", "the archive is empty")
    return target


def _begin(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """The copied thing itself: a folder that is made, or one file."""
    if target.is_symlink():
        # It would lead elsewhere.
        target.unlink()
    if member.isdir():
        target.mkdir(exist_ok=True)
    elif member.isreg():
        source = archive.extractfile(member)
        if source is None:
            raise _hostile("a file without content")
        with source, target.open("wb") as file:
            shutil.copyfileobj(source, file, PART)
        # As the data filter: nobody else may write, the owner may read and write.
        target.chmod((member.mode & 0o755) | 0o600)
    else:
        raise _hostile("something that is neither a file nor a folder")


def _below(archive: tarfile.TarFile, member: tarfile.TarInfo, rest: str, target: Path) -> None:
    if not target.is_dir():
        raise _hostile("an entry below something that is no folder")
    if member.islnk():
        raise _hostile("a hard link")
    member = member.replace(name=rest, deep=False)
    archive.extract(member, target, set_attrs=True, filter="data")


def _hostile(what: str) -> HostileArchive:
    return HostileArchive("hostile_archive", f"the sandbox sent {what}; nothing outside of the destination was written")
