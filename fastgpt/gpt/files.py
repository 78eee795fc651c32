"""Files that a crash cannot tear."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` at the end, if the block ends well.

    Whenever the process or the machine stops, ``path`` holds the old content or the new one. What was
    written in vain stands in ``path`` + ``.tmp``, until the next attempt.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the renaming itself must reach the disk
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
