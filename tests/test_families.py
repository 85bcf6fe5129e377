"""Each family against its published code: small random checkpoints in the published layout, whose logits and texts
tests/published_families holds. Each file there names the code that they come from and its commit.

That code ran in float32 under transformers 4.57.3 (LLaDA2's attention mask cast to float32, too, which it is otherwise
not). Known differences, which these texts avoid: the published loops may generate the mask token; dllm's hides a
generated padding token from later ones, and pads a prompt on the left to whole blocks, where ours decodes the rest of
its last block.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import simsd
from simsd.models.fused import obstacle

FIXTURES = Path(__file__).parent / "published_families"
MASK = 46
NAMES = {"a2d_qwen3": "qwen3", "a2d_qwen2": "qwen2", "a2d_llama": "llama", "llada2": "llada2"}
each = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.usefixtures("one_thread")


def fixture(name: str) -> dict:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def weight(name: str, shape: list[int]) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if "norm" in name:
        return 1 + 0.1 * values
    if name == "lm_head.weight":
        values[MASK] = 0  # never the likeliest
        return values
    return (0.1 if name.endswith("bias") else 0.3) * values


def write(folder: Path, name: str) -> Path:
    """The checkpoint as its publishers would have saved it."""
    data = fixture(name)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data["config"]))
    tensors = {key: weight(key, shape) for key, shape in data["shapes"].items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path, name: str, **changes) -> simsd.LoadedModel:
    return simsd.load(folder, mask_token_id=MASK, block_length=fixture(name)["block_length"], **changes)


@each
def test_logits_are_those_of_the_published_code(name, tmp_path):
    data, loaded = fixture(name), load(write(tmp_path, name), name)
    with torch.no_grad():
        logits = loaded.model(torch.tensor(data["tokens"])).logits[0]
    expected = torch.tensor(data["logits"])
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@each
@pytest.mark.parametrize("verify", ["none", "exact"])
def test_texts_are_those_of_the_published_loop(name, verify, tmp_path):
    write(tmp_path, name)
    texts = fixture(name)["texts"]
    assert len(texts) >= 4 and len({tuple(text["new"]) for text in texts}) >= 3
    for text in texts:
        loaded = load(tmp_path, name, shift=text.get("shift", False))
        config = simsd.GenerationConfig(max_new_tokens=24, end_token_ids=(47,), verify=verify, **text["settings"])
        [result] = simsd.generate(loaded, [text["prompt"]], config=config)
        assert result.tokens == text["new"], text


@each
def test_decoding_runs_fused_and_row_by_row(name, tmp_path):
    loaded = load(write(tmp_path, name), name)
    assert obstacle(loaded.model) is None and loaded.deterministic


@each
def test_a_loaded_model_can_be_saved_and_loaded_without_naming_anything(name, tmp_path):
    loaded = load(write(tmp_path / "in", name), name, shift=True)
    loaded.model.save_pretrained(tmp_path / "out")
    again = simsd.load(tmp_path / "out")
    assert (again.block_length, again.mask_token_id, again.shift) == (8, MASK, True)
    tokens = torch.tensor(fixture(name)["tokens"])
    with torch.no_grad():
        assert torch.equal(again.model(tokens).logits, loaded.model(tokens).logits)
