"""The one file that tells the load processes what to do."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from loadtest.files import write_atomically
from loadtest.payloads import Payload
from loadtest.plan import Plan

JOB_VARIABLE = "TORCHPORT_LOADTEST_JOB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A plan with what it takes to carry it out.

    Attributes:
        plan: What to do.
        payloads: Request bodies, picked at random.
        token: Bearer token, or None for a server that asks for none.
        results: Existing folder; each load process leaves one record there.
    """

    plan: Plan
    payloads: Sequence[Payload]
    token: str | None
    results: Path

    def write(self, path: Path) -> None:
        """Writes the job; its folder must be private, because the file holds the token."""
        document = {
            "plan": asdict(self.plan),
            "payloads": [payload.to_json() for payload in self.payloads],
            "token": self.token,
            "results": str(self.results),
        }
        write_atomically(path, json.dumps(document).encode())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The inverse of `write`."""
        document = json.loads(path.read_bytes())
        return cls(
            plan=Plan(**document["plan"]),
            payloads=[Payload.from_json(payload) for payload in document["payloads"]],
            token=document["token"],
            results=Path(document["results"]),
        )
