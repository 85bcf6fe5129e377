"""The README's four rows, from the measured table of the built-in pair.

python -m benchmarks.headline    writes them between the README's marks
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "benchmarks" / "results" / "tiny_pair.json"
MARK = "benchmarks/headline.py"
MODES = {
    "native": "native",
    "temporal": "SimSD as published (`temporal`)",
    "exact-model": "exact, drafts of a small model",
    "exact-auto": "exact, whichever drafts pay (the default)",
}


def headline() -> str:
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))["benchmarks"]["tiny_pair"]
    rows = [row["cells"] for row in measured["rows"] if row["table"].startswith("All items")]
    lines = [
        "| | target forwards per token | over native | tokens/s over native | same text |",
        "|---|---:|---:|---:|---:|",
    ]
    for mode, _, same, _, per_token, over_native, _, _, speed, *_ in rows:
        if mode in MODES:
            lines.append(f"| {MODES[mode]} | {per_token} | {over_native} | {speed} | {same} |")
    return "\n".join(lines)


def with_headline(readme: str) -> str:
    """The README with these rows."""
    begin, end = f"<!-- begin {MARK} -->", f"<!-- end {MARK} -->"
    return re.sub(f"{begin}\n.*?{end}", lambda _: f"{begin}\n{headline()}\n{end}", readme, flags=re.DOTALL)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_headline(readme.read_text(encoding="utf-8")), encoding="utf-8")
