"""This checkout beside another one, as a user would meet both: `simsd bench` of the one, then of the other, in turn.

    python benchmarks/revisions.py CHECKOUT [--rounds 15] [--items 3] [--out benchmarks/results]

CHECKOUT is another working tree of this repository in which the C++ ops are built, for instance:

    git worktree add ../before REVISION && cd ../before && SIMSD_BUILD_CUDA=0 python setup.py build_ext --inplace

Each run is a process of its own with the same interpreter and packages.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from measured import interval, made_by

RESULTS = pathlib.Path(__file__).parent / "results"
HERE = pathlib.Path(__file__).parent.parent
MODES = ("native", "exact-auto")


def bench(checkout: pathlib.Path, items: int) -> dict:
    """What `simsd bench` writes, of a checkout."""
    environment = os.environ | {"PYTHONPATH": f"{checkout / 'python'}:{checkout}"}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "bench.json"
        command = [sys.executable, "-m", "simsd", "bench", "--items", str(items), "--modes", ",".join(MODES)]
        done = subprocess.run([*command, "--json", file], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"simsd bench failed in {checkout}: {done.stderr}")
        return json.loads(file.read_text(encoding="utf-8"))


def beyond_forwards_ms(mode: dict) -> float:
    """What a target forward and all that comes with it take beyond the forwards themselves, as those of one block's
    rows: bookkeeping, sampling, texts, and the rows of drafted states."""
    seconds_per_token = 1 / mode["tokens_per_second"] - 1 / mode["bound_tokens_per_second"]
    return 1e3 * seconds_per_token / mode["target_forwards_per_token"]


def figures(report: dict) -> dict[str, float]:
    pooled = report["pooled"]
    modes = pooled["modes"]
    found = {f"{mode} tok/s": modes[mode]["tokens_per_second"] for mode in MODES}
    for mode in MODES:
        found[f"{mode}, ms per iteration beyond forwards of one block"] = beyond_forwards_ms(modes[mode])
    for model in ("target", "draft"):
        found[f"{model} forward of 4 rows, ms"] = pooled[f"{model}_forward_ms"]
    return found


def revision(checkout: pathlib.Path) -> str:
    command = ["git", "-C", checkout, "log", "-1", "--format=%h %s"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=pathlib.Path, help="of the revision to compare with, its C++ ops built")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--items", type=int, default=3, help="held-out prompts per family in each run")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for revisions.json and revisions.md")
    arguments = parser.parse_args()
    checkouts = {"before": arguments.checkout.resolve(), "now": HERE}
    for checkout in checkouts.values():  # python would take the installed packages for what is missing
        if not (checkout / "python/simsd").is_dir() or not any(checkout.glob("simsd_kernels/_C*.so")):
            parser.error(f"{checkout} is no checkout in which the C++ ops are built: see --help")
    runs: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    for turn in range(arguments.rounds):
        for name in list(checkouts)[:: 1 if turn % 2 else -1]:
            report = bench(checkouts[name], arguments.items)
            runs[name].append(figures(report))
        print(turn + 1, json.dumps({name: runs[name][-1] for name in runs}), flush=True)
    about = report["machine"]
    lines = [
        f"`simsd bench` of two revisions in turn, {arguments.rounds} rounds, {arguments.items} prompts per family,"
        " batch 1; medians, and the 95% interval of the median ratio (benchmarks/measured.py).",
        "",
        made_by(__file__, about),
        "",
        *(f"- {name}: {revision(checkout)}" for name, checkout in checkouts.items()),
        "",
        "| | before | now | now / before (95%) |",
        "|---|---:|---:|---:|",
    ]
    rows = {}
    for name in runs["now"][0]:
        columns = {which: [run[name] for run in runs[which]] for which in runs}
        before, now = (interval(columns[which])[1] for which in ("before", "now"))
        low, ratio, high = interval([n / b for n, b in zip(columns["now"], columns["before"], strict=True)])
        rows[name] = {"before": before, "now": now, "ratio": ratio, "interval": [low, high]}
        digits = 0 if "tok/s" in name else 2
        lines.append(f"| {name} | {before:.{digits}f} | {now:.{digits}f} | {ratio:.2f} ({low:.2f}-{high:.2f}) |")
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": about, "rounds": arguments.rounds, "items": arguments.items, "rows": rows, "runs": runs}
    arguments.out.joinpath("revisions.json").write_text(json.dumps(report, indent=2) + "\n")
    arguments.out.joinpath("revisions.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
