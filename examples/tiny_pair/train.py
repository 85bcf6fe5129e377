"""Train one model of a built-in pair on a CPU, within a time budget, and export it.

python examples/tiny_pair/train.py target --minutes 85 --out DIR
python examples/tiny_pair/train.py draft --minutes 7.5 --out DIR
python examples/tiny_pair/train.py target --pair long --start python/simsd/pair/tiny-target --minutes 150 --out DIR

DIR receives PAIR-NAME.ckpt (weights, optimizer state, step, elapsed time: the same command resumes from it) and the
folder PAIR-NAME in Hugging Face format.
"""

import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from accuracy import report
from batches import Batch, Encoder, training_batches
from build_tokenizer import build_tokenizer, save_tokenizer
from forward import batch_loss, check
from recipes import RECIPES
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

LAYERS = {"target": 8, "draft": 1}
PARTS_PER_STEP = 4
WARMUP_STEPS = 100
DECAY_FRACTION = 0.25
MUON_LR, ADAM_LR = 0.02, 4e-3
QUERY_SCALE = 1.5
CHECKPOINT_EVERY_S = 240

console = Console()


def shared_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of the first run into a folder serves all later ones: both models, and every resumed run."""
    if not path.exists():
        build_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))


def build_model(name: str, encoder: Encoder) -> Qwen3ForCausalLM:
    """SDAR is Qwen3 with bidirectional blocks; the pair has its shape at a small size."""
    config = Qwen3Config(
        vocab_size=encoder.tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=LAYERS[name],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        attention_bias=False,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=encoder.end_id,
        pad_token_id=encoder.pad_id,
    )
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        # Each layer starts as the identity, which lets Muon run at its full rate from the start.
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        # Normed queries and keys of 32 dimensions start with scores too flat to single out one row of a prompt.
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, QUERY_SCALE)
    return model


def build_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def accumulate_gradients(model: Qwen3ForCausalLM, batches: list[Batch], workers: ThreadPoolExecutor) -> float:
    """Set every parameter's gradient of the mean loss over all masked rows of the batches; returns that loss.

    One single-threaded worker per core takes whole batches. Many threads on each small operation would meet hundreds of
    times per step and lose most of it where anything else runs on the machine.
    """
    parameters = list(model.parameters())
    rows = sum(len(batch.targets) for batch in batches)

    def part(batch: Batch) -> tuple[float, tuple[torch.Tensor, ...]]:
        loss = batch_loss(model, batch) / rows
        return loss.item(), torch.autograd.grad(loss, parameters)

    # Longest first, so that the workers finish together.
    parts = list(workers.map(part, sorted(batches, key=lambda batch: -batch.tokens.numel())))
    for parameter, *gradients in zip(parameters, *(gradients for _, gradients in parts), strict=True):
        parameter.grad = torch.stack(gradients).sum(0)
    return sum(loss for loss, _ in parts)


def learning_rate_factor(step: int, progress: float) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, (1.0 - progress) / DECAY_FRACTION)


def export(model: Qwen3ForCausalLM, encoder: Encoder, block_length: int, folder: Path) -> None:
    """Write the Hugging Face folder; every file appears whole."""
    partial = folder.with_name(folder.name + ".partial")
    save_tokenizer(encoder.tokenizer, partial)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "model.safetensors").chmod(0o644)
    model.config.save_pretrained(partial)
    config = json.loads((partial / "config.json").read_text())
    config |= {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "block_length": block_length,
        "mask_token_id": encoder.mask_id,
        "dtype": "float32",
    }
    (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for path in partial.iterdir():
        path.replace(folder / path.name)
    partial.rmdir()


def main(
    name: Annotated[Literal["target", "draft"], typer.Argument(help="Which model of the pair.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the exported model.")],
    pair: Annotated[Literal["tiny", "long"], typer.Option(help="Short answers in blocks of 4, or long ones.")] = "tiny",
    start: Annotated[Path | None, typer.Option(help="Exported model to start from, with its tokenizer.")] = None,
    minutes: Annotated[float, typer.Option(help="Training time, over all resumed runs together.")] = 70.0,
    evaluate_every: Annotated[float, typer.Option(help="Minutes between progress evaluations.")] = 20.0,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    workers = ThreadPoolExecutor(min(os.cpu_count() or 1, PARTS_PER_STEP))
    out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[pair]
    folder, checkpoint = out / f"{pair}-{name}", out / f"{pair}-{name}.ckpt"
    encoder = Encoder(shared_tokenizer((start or out) / "tokenizer.json"))
    model = build_model(name, encoder)
    if start is not None:
        model.load_state_dict(load_file(start / "model.safetensors"))
    optimizers = build_optimizers(model)
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    step, elapsed = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, elapsed = state["step"], state["elapsed"]
    # A resumed run draws new items instead of repeating the first ones.
    rng, noise = random.Random(f"{seed}/{step}"), np.random.default_rng([seed, step])
    console.log(f"{folder.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, from step {step}")

    def save() -> None:
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        torch.save(state | {"step": step, "elapsed": elapsed}, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").replace(checkpoint)

    def grade(count: int) -> None:
        export(model, encoder, recipe.block_lengths[0], folder)
        report(str(folder), recipe, count, console)

    check(model, training_batches(encoder, recipe, PARTS_PER_STEP, rng, noise)[0])
    last_save = last_report = elapsed
    losses: list[float] = []
    model.train()
    while elapsed < 60 * minutes:
        started = time.perf_counter()
        factor = learning_rate_factor(step, elapsed / (60 * minutes))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, base_rates, strict=True):
            group["lr"] = rate * factor
        batches = training_batches(encoder, recipe, PARTS_PER_STEP, rng, noise)
        losses.append(accumulate_gradients(model, batches, workers))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        elapsed += time.perf_counter() - started
        if step % 50 == 0:
            mean, losses = sum(losses) / len(losses), []
            console.log(f"step {step}  {elapsed / 60:.1f}/{minutes:g} min  loss {mean:.4f}  rate x{factor:.2f}")
        if elapsed - last_save > CHECKPOINT_EVERY_S:
            last_save = elapsed
            save()
        if elapsed - last_report > 60 * evaluate_every:
            last_report = elapsed
            grade(count=50)
    save()
    grade(count=200)


if __name__ == "__main__":
    typer.run(main)
