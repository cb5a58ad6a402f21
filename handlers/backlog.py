"""What waits to be computed, and which batch of it runs next.

A plan is made of all that waits. Yet while its first batches run more arrives, and with that the next batch may be
better than what was planned: so a plan is followed for a quarter of its samples, and then made anew. The batch runs
first that pays best, in time that its samples would take without calls and padding for the time that it takes; and
waiting counts as well, so that everybody's turn comes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from handlers.planner import MOST_PLANNED
from handlers.tensors import TensorBatch

Place = TypeVar("Place")

PlanInTurn = Callable[[Sequence[TensorBatch], Sequence[float]], Sequence[Sequence[int]]]
"""From samples and the seconds that each has waited to batches of their positions, in the order in which they run."""

# Plans cost time, too: of all that is gained by planning anew for every batch, most is left at a quarter.
_FOLLOWED = 4


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Place]):
    """A sample.

    Attributes:
        place: Whose it is.
        sample: Its inputs by name.
        arrived: When it came, on the clock of :meth:`Backlog.take`.
    """

    place: Place
    sample: TensorBatch
    arrived: float


class Backlog(Generic[Place]):
    """Samples that wait, each with a place of the caller's.

    Args:
        plan: Makes plans; never of more than ``MOST_PLANNED`` samples, the oldest.
    """

    def __init__(self, plan: PlanInTurn) -> None:
        self._plan = plan
        self._numbers = itertools.count()
        # By number, which is the order in which they came.
        self._waiting: dict[int, _Waiting[Place]] = {}
        self._planned: deque[list[int]] = deque()
        self._followed = 0

    def __len__(self) -> int:
        """Samples that wait."""
        return len(self._waiting)

    def add(self, place: Place, sample: TensorBatch, arrived: float) -> None:
        """Let a sample wait.

        Args:
            place: Whose it is.
            sample: Its inputs by name, without the batch axis.
            arrived: When it came, in seconds.
        """
        self._waiting[next(self._numbers)] = _Waiting(place, sample, arrived)

    def take(self, now: float) -> tuple[list[Place], list[TensorBatch]]:
        """The batch that runs next; there must be something that waits.

        Args:
            now: In seconds, on the clock of the arrivals.
        """
        if not self._planned or self._followed <= 0:
            self._make_plan(now)
        numbers = self._planned.popleft()
        self._followed -= len(numbers)
        taken = [self._waiting.pop(number) for number in numbers]
        return [item.place for item in taken], [item.sample for item in taken]

    def _make_plan(self, now: float) -> None:
        numbers = list(itertools.islice(self._waiting, MOST_PLANNED))
        items = [self._waiting[number] for number in numbers]
        batches = self._plan([item.sample for item in items], [now - item.arrived for item in items])
        self._planned = deque([numbers[i] for i in batch] for batch in batches)
        self._followed = len(numbers) // _FOLLOWED
