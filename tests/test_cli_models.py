"""simsd models: the built-in models and what the Hugging Face cache holds."""

from __future__ import annotations

import json
import shutil

import pytest
from huggingface_hub import constants

import byte_pair
from simsd.models.folders import BUILT_IN


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def cached(cache, name: str, revision: str = "abc", **changes):
    """A checkpoint where the hub's client would put it; `changes` go to its config.json."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    shutil.copytree(byte_pair.write_model(cache / "model", tokenizer=False), snapshot)
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_built_in_and_cached_models_are_listed_with_their_sizes(run, cache, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    cached(cache, "JetLM/SDAR-1.7B-Chat", block_length=None, block_size=8)
    cached(cache, "org/other", model_type="llama")
    (cache / "models--org--empty").mkdir()
    code, out, err = run("models")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.split("families")[0].splitlines() if line.startswith("  ")}
    assert list(lines) == [*BUILT_IN, "JetLM/SDAR-1.7B-Chat"]
    assert "2.01 M parameters, 8 layers of 128, vocabulary 1713, block length 4, 8.1 MB" in lines["tiny-target"]
    assert "block length 16, 2.5 MB" in lines["long-draft"]
    assert "2 layers of 32, vocabulary 258, block length 8" in lines["JetLM/SDAR-1.7B-Chat"]


def test_the_revision_is_the_one_that_loads(run, cache):
    folder = cached(cache, "org/two", "old", block_length=4)
    cached(cache, "org/two", "new", block_length=16)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("old")
    _, out, _ = run("models", "--json")
    assert json.loads(out)["cached"][0]["folder"] == str(folder / "snapshots" / "old")


def test_a_checkpoint_without_all_of_its_weights_says_so(run, cache):
    snapshot = cached(cache, "org/half") / "snapshots" / "abc"
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    code, out, _ = run("models")
    assert code == 0
    assert "1 of 2 weight files are not there, model-00002-of-00002.safetensors" in " ".join(out.split())


def test_an_empty_cache_says_what_would_be_there(run, cache):
    code, out, _ = run("models")
    assert code == 0 and f"cached in {cache}\n  none of a family that loads\n" in out


@pytest.mark.parametrize("width", [80, 120])
def test_families_are_tables_that_fit_the_terminal(run, cache, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = run("models")
    assert (code, err) == (0, "")
    assert all(len(line) <= width or line.startswith("cached in ") for line in out.splitlines())  # a path stays whole
    families, checked = out.split("families that load")[1].split("what they were checked against")
    settings = {line.split()[0]: line.split()[-5:] for line in families.splitlines() if line.strip()}
    assert settings["family"] == ["models", "block", "mask", "shift", "layers"]
    assert settings["stable_diffcoder"] == ["Stable-DiffCoder-8B", "4", "5", "no", "Llama"]
    assert settings["llada2"][-5:] == ["32", "156895", "no", "GLM-4", "MoE"]
    assert settings["qwen3"][-4:] == ["32", "-", "no", "Qwen3"]
    checked, refused = (" ".join(part.split()) for part in checked.split("not decoded"))
    assert "llada2 modeling_llada2_moe.py with its generate (ZHZisZZ/dllm ca17675)" in checked
    assert "Dream it denoises the whole sequence at once, so that no block is ever finished" in refused
    assert "Efficient-DLM its published code was not to be had" in refused


def test_families_and_refusals_are_told_in_full_as_json(run, cache):
    listed = json.loads(run("models", "--json")[1])
    assert {"sdar", "qwen3", "llada2"} <= {family["name"] for family in listed["families"]}
    assert all(family["checked"] for family in listed["families"])
    assert {"Dream", "LLaDA", "Efficient-DLM"} <= {refusal["models"] for refusal in listed["refused"]}
    assert all(refusal["reason"] for refusal in listed["refused"])


def test_names_in_brackets_are_shown_as_they_are(run, cache, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    cached(cache, "org/[red]model")
    code, out, _ = run("models")
    assert code == 0 and "org/[red]model" in out


def test_a_cached_model_of_a_stock_type_counts_by_its_architecture(run, cache):
    cached(cache, "ByteDance-Seed/Stable-DiffCoder", model_type="llama", architectures=["StableDiffcoderForCausalLM"])
    cached(cache, "org/LLaDA2.1-mini", model_type="llada2_moe")
    _, out, _ = run("models", "--json")
    assert [model["name"] for model in json.loads(out)["cached"]] == ["ByteDance-Seed/Stable-DiffCoder"]
