"""Sorts what one load process sees into its tally."""

from loadtest.answers import Fault
from loadtest.tally import Tally


class Recorder:
    """Counts the requests of one load process; warm-up requests are left out.

    All times are seconds on one monotonic clock.

    Args:
        start_s: When the load began, warm-up included.
        warm_up_s: Requests planned in this first stretch are not counted.
        duration_s: Length of the measured window that follows.
        interval_s: Width of one step over time.
        late_s: A request that leaves this long after the window's end still left on time.
    """

    def __init__(
        self, *, start_s: float, warm_up_s: float, duration_s: float, interval_s: float, late_s: float
    ) -> None:
        self._window_start_s = start_s + warm_up_s
        self._duration_s = duration_s
        self._interval_s = interval_s
        self._late_s = late_s
        self.tally = Tally()

    def record(self, *, planned_s: float, sent_s: float | None, done_s: float, fault: Fault | None) -> None:
        """Counts one finished request.

        Args:
            planned_s: When it should have been sent; in a closed loop, when it was.
            sent_s: When it was sent; None when it never was.
            done_s: When its whole answer, or its failure, was there.
            fault: Why it failed; None for a right answer.
        """
        self._count_finished(done_s, right=fault is None)
        offset_s = planned_s - self._window_start_s
        if not 0 <= offset_s < self._duration_s:
            return
        tally = self.tally
        interval = tally.interval(int(offset_s / self._interval_s))
        tally.requests += 1
        interval.requests += 1
        if sent_s is not None:
            tally.send_lag.record(sent_s - planned_s)
            if sent_s - self._window_start_s < self._duration_s + self._late_s:
                tally.on_time += 1
            if fault is None:
                tally.service.record(done_s - sent_s)
                tally.latency.record(done_s - planned_s)
                interval.latency.record(done_s - planned_s)
        if fault is not None:
            tally.count_fault(fault)

    def _count_finished(self, done_s: float, *, right: bool) -> None:
        # By the time of the answer and warm-up requests included: what was in flight when the window opened
        # makes up for what was still in flight when it closed, so the throughput has no edge error.
        offset_s = done_s - self._window_start_s
        if not 0 <= offset_s < self._duration_s:
            return
        interval = self.tally.interval(int(offset_s / self._interval_s))
        if right:
            interval.right += 1
        else:
            interval.failed += 1
