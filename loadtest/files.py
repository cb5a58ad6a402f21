"""Files that are either whole or not there."""

import os
from pathlib import Path

from boltons.fileutils import atomic_save


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file beside its final path, then renames it over whatever was there.

    Args:
        path: The final path; its folder must exist.
        content: All of the file.
    """
    # boltons puts the part beside the final file: it takes a name, not a path.
    part = f".{path.name}.{os.getpid()}.part"
    with atomic_save(str(path), part_file=part, overwrite=True, overwrite_part=True, rm_part_on_exc=True) as opened:
        opened.write(content)
