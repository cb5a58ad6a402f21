"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from boltons.fileutils import atomic_save


@contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """Opens a hidden file beside `path` that takes its place when the block ends well.

    A crash at any moment leaves the old file or the new one; an exception also removes the hidden file.

    Raises:
        OSError: when the folder or the disk refuses.
    """
    part_name = f".{path.name}.{os.getpid()}.part"
    # overwrite_part: a part with this process's number was left by a killed process that had it before.
    part: IO[bytes] | None = None
    try:
        with atomic_save(path, part_file=part_name, overwrite=True, overwrite_part=True) as part:
            yield part
    except BaseException:
        # boltons keeps its file, still open, when its own flush is what fails: on a full disk.
        with suppress(OSError):
            if part is not None:
                part.close()
        with suppress(OSError):
            path.with_name(part_name).unlink(missing_ok=True)
        raise


def remove_parts(folder: Path) -> None:
    """Removes what killed writers left in a folder that nobody is writing to."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)
