"""Writes a file so that readers and later runs find all of it or what was there before, whatever ends the writing."""

import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a hidden name first, and rename it into place last; its folder must exist.

    Raises:
        OSError: naming the file, where the machine or its rights refuse; nothing half-written is left then.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # A full disk is told by a write, which knows no name; what was written so far is what others lack.
        error.filename, error.filename2 = str(path), None
        temporary.unlink(missing_ok=True)
        raise
