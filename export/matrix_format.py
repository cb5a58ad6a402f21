"""Numbers of the matrix as people read them, for the terminal and the page alike."""

from __future__ import annotations

from export.gates import GateResult

ABSENT = "—"


def megabytes(count: int | None) -> str:
    """Bytes in millions."""
    if count is None:
        return ABSENT
    value = count / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def milliseconds(value: float) -> str:
    """Three significant digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rate(value: float | None) -> str:
    """Samples a second."""
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def times(value: float | None) -> str:
    """A factor."""
    return ABSENT if value is None else f"{value:.2f}\N{MULTIPLICATION SIGN}"


def small(value: float | None) -> str:
    """A difference: two significant digits."""
    return ABSENT if value is None else f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.2g}"


def share(gate: GateResult | None) -> str:
    """What a gate measured, in percent."""
    return ABSENT if gate is None or gate.measured is None else f"{gate.measured:.2%}"
