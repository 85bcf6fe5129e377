"""`simsd info`: what is installed, what can run, and the built-in models."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from simsd.cli import streams
from simsd.cli.models import built_in_models, show


def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, kernel backends, batch invariance and built-in models."""
    from simsd_kernels import info as kernels

    report = kernels.collect()
    mine = {"versions": versions(), "batch_invariance": batch_invariance(), "models": built_in_models()}
    if as_json:
        print(json.dumps({"kernels": report} | mine, indent=2, default=str))
        return
    print(kernels.render(report))
    print("\nsimsd: " + ", ".join(f"{name} {version}" for name, version in mine["versions"].items()))
    print("\nbatch invariance: are a row's bits the same whatever rows ride along?")
    width = max(map(len, mine["batch_invariance"]))
    for operation, answer in mine["batch_invariance"].items():
        print(f"  {operation.ljust(width)}  {answer}")
    print("\nbuilt-in models")
    show(mine["models"], streams.output())


def versions() -> dict[str, str]:
    """Versions of what the decoding loop and the command line stand on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("transformers", "tokenizers", "safetensors", "typer", "rich"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def batch_invariance() -> dict[str, str]:
    """Operation and backend -> whether a row's result depends on the other rows; torch's linear layer is tried now."""
    from simsd_kernels import dispatch

    def promise(op: str, key: str, detail: str = "") -> str:
        obstacle = dispatch.compiled_obstacle(op, key)
        return f"yes{detail}" if obstacle is None else f"not on offer: {obstacle}"

    unmeasured = ", by construction; not measured on a GPU"

    return {
        "attention, cpu": promise("masked_attention", "CPU"),
        "attention, cuda": promise("masked_attention", "CUDA", unmeasured),
        "attention, triton": f"yes{unmeasured}",
        "torch linear, cpu float32": _torch_linear("float32"),
        "torch linear, cpu bfloat16": _torch_linear("bfloat16"),
        "thin_linear, cpu": promise("thin_linear", "CPU", " (what decoding runs on)"),
        "thin_linear, cuda": promise("thin_linear", "CUDA", unmeasured),
        "thin_linear, reference": "yes, but slow",
    }


def _torch_linear(dtype: str) -> str:
    """Which of 1 to 16 rows differ from the same rows among 64, in two small products; never raises."""
    import torch

    try:
        generator = torch.Generator().manual_seed(0)
        differing = set()
        with torch.inference_mode():
            for inputs, outputs in ((128, 384), (512, 256)):
                shapes = (64, inputs), (outputs, inputs)
                x, weight = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes)
                whole = torch.nn.functional.linear(x, weight)
                for rows in range(1, 17):
                    if not torch.equal(torch.nn.functional.linear(x[:rows], weight), whole[:rows]):
                        differing.add(rows)
    except Exception as error:  # info reports what is broken, it does not break
        return f"unknown ({type(error).__name__}: {error})"
    if not differing:
        return "yes at 1 to 16 rows (tried now)"
    return f"no: {', '.join(map(str, sorted(differing)))} of 1 to 16 rows differ from 64 (tried now)"
