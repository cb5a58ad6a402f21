"""The digest of a data set: what tells whether two runs saw the same data."""

import hashlib
import json
from collections.abc import Iterable


class SampleDigest:
    """The SHA-256 of samples and labels, in order.

    Args:
        header: what the samples have in common, such as the class names; anything that JSON can say.
    """

    def __init__(self, header: object) -> None:
        self._digest = hashlib.sha256(json.dumps(header).encode())

    def start_split(self) -> None:
        """What is added from here on is in the next split."""
        self._digest.update(b"split")

    def add(self, content: bytes, label: int) -> None:
        """Adds a sample."""
        # With its length before it, no content can be taken for the end of one and the beginning of the next.
        self._digest.update(b"%d:%d:" % (label, len(content)))
        self._digest.update(content)

    def hexdigest(self) -> str:
        """The digest of all that was added."""
        return self._digest.hexdigest()


def sample_digest(header: object, splits: Iterable[Iterable[tuple[bytes, int]]]) -> str:
    """Computes a `SampleDigest` at once.

    Args:
        header: as in `SampleDigest`.
        splits: for each split its samples as (content, label), read once.
    """
    digest = SampleDigest(header)
    for split in splits:
        digest.start_split()
        for content, label in split:
            digest.add(content, label)
    return digest.hexdigest()
