"""What gpu_limits.py was asked to show, beside what it found."""

from collections.abc import Iterator, Mapping
from typing import Any

from gpu_subjects import ENCODER, IMAGES

Document = dict[str, object]

# MLPerf's H200 has 0.835 and 0.786 of its offline rate within the same bounds, without HTTP.
SERVED, WITHIN_SLO, STOCK = 0.90, 0.85, 5.0


def verdicts(document: Mapping[str, Any]) -> list[Document]:
    """A row for each figure that is wanted: ``met``, ``short``, ``open`` where it was not measured, ``shown`` where no
    bound was set.
    """
    return [row for name in (ENCODER, IMAGES) for row in _of(name, document.get(name), document.get(f"serve-{name}"))]


def _of(name: str, measured: Mapping[str, Any] | None, served: Mapping[str, Any] | None) -> Iterator[Document]:
    measured, served = measured or {}, served or {}
    best = max(measured.get("by_batch_size", []), key=lambda row: row["samples_per_s"], default={})
    yield _row(name, "samples/s in process", measured.get("in_process_per_s"))
    yield _row(name, f"share of the matrix rate, batch {best.get('batch', '?')}", best.get("share_of_matrix_rate"))
    yield _row(name, f"share of the bandwidth, batch {best.get('batch', '?')}", best.get("share_of_bandwidth"))
    yield _row(name, "served / in process", served.get("served_of_in_process"), SERVED)
    yield _row(
        name,
        f"rate with p99 <= {served.get('slo_ms', '?')} ms / in process",
        served.get("slo_of_in_process"),
        WITHIN_SLO,
    )
    yield _row(name, "times stock TorchServe in fp32", served.get("times_stock_fp32"), STOCK)
    yield _row(name, "times stock TorchServe in bf16", served.get("times_stock_bf16"))
    for row in measured.get("graphs_against_plain", [{}]):
        yield _row(name, f"CUDA graphs / plain launches, batch {row.get('batch', '?')}", row.get("graphs_times_faster"))
    for row in measured.get("agreement_with_fp32_on_the_cpu", [{}]):
        yield _row(name, "distance from fp32 on the CPU", row.get("distance"), row.get("distance_bound"), most=True)
        yield _row(name, "same class as fp32 on the CPU", row.get("agreement"), row.get("agreement_bound"))


def _row(model: str, what: str, found: float | None, wanted: float | None = None, *, most: bool = False) -> Document:
    """A row.

    Args:
        model: Of which.
        what: Is measured.
        found: None if it was not.
        wanted: None if nothing is.
        most: Whether it should not be more, instead of not less.
    """
    if found is None:
        verdict = "open"
    elif wanted is None:
        verdict = "shown"
    else:
        # NaN is neither.
        verdict = "met" if (found <= wanted if most else found >= wanted) else "short"
    bound = None if wanted is None else f"{'<=' if most else '>='} {wanted:g}"
    return {"model": model, "what": what, "found": found, "wanted": bound, "verdict": verdict}
