"""What both clients do with files of this side."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ._tar import exactly

Content = bytes | str | BinaryIO | os.PathLike[str]


def sized(content: Content) -> tuple[bytes | Callable[[], Iterator[bytes]], int]:
    """What is sent and how long it is. A path and a file are read in parts, anew for each attempt; a file from where it is now."""
    if isinstance(content, str):
        content = content.encode()
    if isinstance(content, (bytes, bytearray, memoryview)):
        return bytes(content), len(content)
    if isinstance(content, os.PathLike):
        path = Path(content)
        size = path.stat().st_size

        def read_path() -> Iterator[bytes]:
            with path.open("rb") as file:
                yield from exactly(file, size)

        return read_path, size
    file = content
    start = file.tell()
    left = file.seek(0, io.SEEK_END) - start

    def read_file() -> Iterator[bytes]:
        file.seek(start)
        yield from exactly(file, left)

    return read_file, left
