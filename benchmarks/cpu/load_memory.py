"""What loading takes besides the model: the peak of a process's memory above what it had before, over the size of the
weights, by `simsd.load` and by transformers' `from_pretrained`, each weight read once.

Checkpoints are random, sharded, and in the page cache when they are loaded. Each load has a process of its own, which
has loaded a small one before, so that what is imported on the way is not counted. Its peak is Linux's (VmHWM): pages of
mapped files count as well where they were touched, though the system may take them back.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..contest import Bench
from ..processes import ROOT, environment
from ..report import Table

MIB = 2**20
SHARDS = 8
SIZES = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
DENSE = {"model_type": "sdar", "intermediate_size": 3072}
MOE = {
    "model_type": "sdar_moe",
    "intermediate_size": 3072,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 192,
}
# Case: the configuration, and the dtype that is stored. All are loaded in bfloat16.
CASES = {
    "as stored": (DENSE, torch.bfloat16),
    "cast from float32": (DENSE, torch.float32),
    "experts one by one": (MOE, torch.bfloat16),
}
LOADERS = ("simsd", "transformers")
TABLE = Table(
    [
        ("checkpoint", "{case}"),
        ("weights in bfloat16, MiB", "{mib:.0f}"),
        ("files, MiB", "{files_mib:.0f}"),
        ("simsd: peak / weights", "{simsd[peak]:.2f}"),
        ("seconds", "{simsd[seconds]:.1f}"),
        ("transformers: peak / weights", "{transformers[peak]:.2f}"),
        ("seconds", "{transformers[seconds]:.1f}"),
    ]
)


def write(folder: Path, mib: int, case: str) -> None:
    """A sharded checkpoint of about `mib` MiB in bfloat16."""
    from simsd.models import checkpoint, weights

    fields, dtype = CASES[case]
    fields = SIZES | fields | {"vocab_size": 32 * mib, "num_hidden_layers": 1, "block_length": 4, "mask_token_id": 0}
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {}
    for _ in range(2):  # with one layer, then with as many as make up the size
        (folder / "config.json").write_text(json.dumps(fields))
        _, config = checkpoint.read_config(folder)
        skeleton = weights.skeleton(str(folder), config)
        shapes = {name: value.shape for name, value in weights.by_source_name(skeleton.state_dict(), ()).items()}
        layer = sum(2 * shape.numel() for name, shape in shapes.items() if ".layers.0." in name)
        rest = sum(2 * shape.numel() for name, shape in shapes.items() if ".layers." not in name)
        fields["num_hidden_layers"] = max(1, round((mib * MIB - rest) / layer))
    files = {name: f"model-{i * SHARDS // len(shapes) + 1:05}.safetensors" for i, name in enumerate(shapes)}
    for file in set(files.values()):
        names = [name for name in shapes if files[name] == file]
        tensors = {name: torch.empty(shapes[name], dtype=dtype).normal_(0, 0.02) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def load(folder: Path, loader: str, quantize: str | None = None) -> torch.nn.Module:
    if loader == "simsd":
        import simsd

        return simsd.load(folder, dtype="bfloat16", quantize=quantize).model
    from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

    is_moe = json.loads((folder / "config.json").read_text())["model_type"] == "sdar_moe"
    return (Qwen3MoeForCausalLM if is_moe else Qwen3ForCausalLM).from_pretrained(folder, dtype=torch.bfloat16)


def measured(folder: Path, small: Path, loader: str, *quantize: str) -> dict[str, float]:
    """`peak`: over the bytes of the weights; and `seconds`, of a load in a process of its own. `quantize`: simsd's."""
    command = [sys.executable, "-m", __name__, str(folder), str(small), loader, *quantize]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{loader} did not load {folder}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def status(field: str) -> int:
    """Bytes, of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main(folder: Path, small: Path, *loader: str) -> None:
    torch.set_num_threads(1)
    load(small, *loader)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begin = status("VmRSS"), time.perf_counter()
    from simsd.models.quantized import data_of

    tensors = [part.detach() for weight in load(folder, *loader).parameters() for part in data_of(weight)]
    for tensor in tensors:  # what was mapped and not read yet counts, too
        tensor.aminmax()
    seconds, above = time.perf_counter() - begin, status("VmHWM") - before
    size = sum(tensor.nbytes for tensor in tensors)
    print(json.dumps({"peak": above / size, "seconds": seconds, "bytes": size}))


def run(bench: Bench, cases: list[str], mib: int, repeats: int) -> None:
    """`repeats`: loads of each checkpoint by each loader, in turn; medians."""
    with tempfile.TemporaryDirectory() as place:
        for case in cases:
            folder, small = Path(place) / "large", Path(place) / "small"
            write(folder, mib, case)
            write(small, 8, case)
            loads = {loader: [] for loader in LOADERS}
            for _ in range(repeats):
                for loader in LOADERS:
                    loads[loader].append(measured(folder, small, loader))
            found = {
                loader: {figure: statistics.median(one[figure] for one in ones) for figure in ("peak", "seconds")}
                for loader, ones in loads.items()
            }
            files = list(folder.glob("*.safetensors"))
            bench.row(
                TABLE,
                case=case,
                mib=loads["simsd"][0]["bytes"] / MIB,
                files_mib=sum(file.stat().st_size for file in files) / MIB,
                **found,
            )
            for file in files:
                file.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
