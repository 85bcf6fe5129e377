"""What a careful reading of the kernels' source and machine code promises on an H100 (3.35 TB/s); not measurements.

A report holds each beside what was measured. A figure far from its prediction, either way, is the first to look into.
"""

from __future__ import annotations

from typing import NamedTuple

H100_GB_S = 3350.0
MICROSECONDS, MILLISECONDS = "us", "ms"


class Prediction(NamedTuple):
    """`low` to `high`, in `unit`; `why`: what it is bound by."""

    benchmark: str
    case: str
    low: float
    high: float
    why: str
    unit: str = MICROSECONDS


LATENCY = "two memory latencies one after the other in a block, the partial results' combination a second kernel"
SCRATCH = "a cap on scratch sends most cases to few blocks that walk over all keys"
PREDICTIONS = (
    Prediction("attention", "few rows 16 x 4096 keys, batch 1", 11, 14, LATENCY),
    Prediction("attention", "few rows 64 x 4096 keys, batch 1", 11, 14, LATENCY),
    Prediction("attention", "few rows 256 x 4096 keys, batch 1", 23, 28, "partial results as large as K and V"),
    Prediction("attention", "few rows 64 x 32768 keys, batch 1", 500, 700, SCRATCH),
    Prediction("attention", "few rows 64 x 4096 keys, batch 8", 65, 80, SCRATCH),
    Prediction("sampling", "greedy, 64 rows", 19, 19, "1,000 instructions per 1,024 ids, and two small kernels"),
    Prediction("sampling", "temperature 1, 64 rows", 35, 40, "2,360 instructions per 1,024 ids, and two small kernels"),
    Prediction("linear", "SDAR-8B q_proj 4096 x 4096, 16 rows", 14, 14, "start and end of one wave of blocks"),
    Prediction("linear", "SDAR-8B gate_proj 12288 x 4096, 16 rows", 38, 38, "start and end of one wave of blocks"),
    Prediction("verification", "plan_block, batch 1, block 4", 50, 50, "latency"),
    Prediction("verification", "verify_graph, batch 1, block 4", 40, 40, "latency"),
    Prediction("end_to_end", "exact-model, block 4, batch 1, wrong 0", 35, 40, "5,600 launches by the host", "ms"),
)
TOLERANCE = 0.3  # of a prediction, either way


def compared(report: dict) -> list[tuple[str, str, str, str, str]]:
    """(case, predicted, floor, measured, verdict) of each; the floor is its bytes at an H100's memory bandwidth."""
    lines = []
    for one in PREDICTIONS:
        rows = report.get("benchmarks", {}).get(one.benchmark, {}).get("rows", [])
        row = next((row for row in rows if row["case"] == one.case), {})
        floor = f"{row['bytes'] / H100_GB_S / 1e3:.1f}" if row.get("bytes") else ""
        value = measured(row, one.unit)
        predicted = f"{one.low:g}" if one.low == one.high else f"{one.low:g}-{one.high:g}"
        said = "not measured" if value is None else f"{value:.1f}"
        lines.append((one.case, f"{predicted} {one.unit}", floor, said, verdict(one, value)))
    return lines


def measured(row: dict, unit: str) -> float | None:
    """The fastest of ours in a row, or the milliseconds of an iteration of decoding."""
    if unit == MILLISECONDS:
        return row.get("figures", {}).get("ms_per_iteration")
    timed = {name: figures["us"] for name, figures in row.get("contestants", {}).items() if "us" in figures}
    return min((us for name, us in timed.items() if name.startswith("simsd ")), default=None)


def verdict(prediction: Prediction, value: float | None) -> str:
    if value is None:
        return ""
    if value > (1 + TOLERANCE) * prediction.high:
        return f"{value / prediction.high:.1f}x slower; predicted from: {prediction.why}"
    return "faster" if value < (1 - TOLERANCE) * prediction.low else "as predicted"
