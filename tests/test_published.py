"""SDAR's published folders, key for key: what they load as, decode to, and give in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import published
import simsd
from published import ENDOFTEXT, IM_END, MASK_ID, VOCABULARY
from simsd import SimsdError
from simsd.models.families.sdar import SDARForCausalLM
from small_checkpoints import edit_json, stock_block_causal_logits

PROMPTS = [[5, 9, 200, 31, 7], [77, 8, 120]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return published.write_all(tmp_path_factory.mktemp("hub") / "SDAR-4B-Chat", "SDAR-4B-Chat")


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """The folder with one weight file, for tests that change it."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for file in folder.glob("*"):
        if file.suffix in (".json", ".txt") and file.name != "model.safetensors.index.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def tokens():
    return torch.randint(3, 250, (2, 70), generator=torch.Generator().manual_seed(1))


def decoded(model: simsd.LoadedModel, verify: str) -> list[list[int]]:
    settings = {"steps": 8} if model.block_length > 8 else {}
    config = simsd.GenerationConfig(max_new_tokens=model.block_length + 8, verify=verify, **settings)
    return [result.tokens for result in simsd.generate(model, PROMPTS, config=config)]


@pytest.mark.parametrize("name", published.CONFIGS)
def test_a_published_config_decodes_to_the_tokens_of_a_minimal_one(name, tmp_path, tokens):
    place, other = tmp_path / name.split()[0], tmp_path / "minimal"
    stock = published.write(place, published.config(name))
    published.write(other, published.minimal(name))
    for folder in (place, other):
        published.write_tokenizer(folder)
    loaded, minimal = (simsd.load(folder, dtype="float32") for folder in (place, other))
    block_length = published.BLOCK_LENGTHS[name]
    assert (loaded.block_length, loaded.mask_token_id) == (block_length, MASK_ID)
    with torch.no_grad():
        expected = stock_block_causal_logits(stock, tokens, block_length)
        torch.testing.assert_close(loaded.model(tokens).logits, expected, atol=1e-4, rtol=1e-4)

    texts = decoded(minimal, "none")
    assert all(len(text) > 4 and max(text) < MASK_ID for text in texts)
    assert decoded(loaded, "none") == decoded(loaded, "exact") == decoded(minimal, "exact") == texts


# Two processes, one folder

_ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM, pipeline
folder, out = sys.argv[1:]
tokens = torch.load(out)
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    refusal = str(error)
import simsd
pipe = pipeline("text-generation", folder, dtype="float32")
models = {
    "auto": AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
    "pipeline": pipe.model,
    "stored": AutoModelForCausalLM.from_pretrained(folder),
}
with torch.no_grad():
    logits = {name: model(tokens).logits for name, model in models.items()}
[answer] = pipe("a the", max_new_tokens=12, do_sample=False, return_tensors=True)
torch.save({"refusal": refusal, "logits": logits, "text": answer["generated_token_ids"]}, out)
"""


def test_another_process_gets_the_same_logits_and_text_from_transformers(folder, tokens, tmp_path):
    """Before `import simsd`, transformers alone refuses the folder: it knows no SDAR."""
    file = tmp_path / "exchange.pt"
    torch.save(tokens, file)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", _ELSEWHERE, str(folder), str(file)], check=True, env=environment)
    given = torch.load(file)
    assert "sdar" in given["refusal"] or "custom code" in given["refusal"]
    loaded = simsd.load(folder, dtype="float32")
    prompt = loaded.tokenizer.backend.encode("a the")
    [result] = simsd.generate(loaded, [prompt], config=simsd.GenerationConfig(max_new_tokens=12))
    assert given["text"] == prompt + result.tokens
    with torch.no_grad():
        expected = {"float32": loaded.model(tokens).logits}
        expected["stored"] = simsd.load(folder, thin_linear=False).model(tokens).logits
    assert expected["stored"].dtype == torch.bfloat16
    assert torch.equal(given["logits"].pop("stored"), expected["stored"])
    for name, logits in given["logits"].items():
        torch.testing.assert_close(logits, expected["float32"], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_trusting_the_folders_own_code_or_naming_the_class_gives_the_same_model(folder, tokens):
    classes = (AutoModelForCausalLM, {"trust_remote_code": True}), (SDARForCausalLM, {})
    with torch.no_grad():
        expected = simsd.load(folder, dtype="float32").model(tokens).logits
        for loader, settings in classes:
            model = loader.from_pretrained(folder, dtype="float32", **settings)
            assert type(model) is SDARForCausalLM
            torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)


# generation_config.json and use_cache


def test_hf_generate_takes_the_published_sampling_settings_and_simsd_generate_its_own(folder):
    loaded = simsd.load(folder, dtype="float32")
    assert loaded.model.config.use_cache is False
    assert loaded.end_token_ids == (IM_END, ENDOFTEXT)
    ids = torch.tensor(PROMPTS[:1])
    call = {"custom_generate": simsd.hf_generate, "tokenizer": loaded.tokenizer.backend}
    given = loaded.model.generate(ids, **call, max_new_tokens=12, seed=3)
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "seed": 3}
    sampled, greedy = (
        simsd.generate(loaded, PROMPTS[:1], config=simsd.GenerationConfig(max_new_tokens=12, **settings))[0].tokens
        for settings in (sampling, {})
    )
    assert given[0, ids.shape[1] :].tolist() == sampled != greedy


def test_use_cache_false_is_refused_where_the_call_says_so_and_not_where_a_file_does(copy):
    edit_json(copy / "generation_config.json", use_cache=False)
    ids = torch.tensor(PROMPTS[:1])
    call = {"custom_generate": simsd.hf_generate, "max_new_tokens": 8, "do_sample": False}
    for model in (simsd.load(copy).model, AutoModelForCausalLM.from_pretrained(copy)):
        assert model.generate(ids, **call).shape == (1, ids.shape[1] + 8)
    (copy / "generation_config.json").unlink()
    model = simsd.load(copy).model
    assert model.generate(ids, **call, pad_token_id=0).shape == (1, ids.shape[1] + 8)
    edit_json(copy / "config.json", use_cache=True)
    with pytest.raises(SimsdError, match="use_cache=False"):
        simsd.load(copy).model.generate(ids, **call, use_cache=False)


# Tokenizer files


def words(loaded: simsd.LoadedModel, ids: list[int]) -> str:
    return loaded.tokenizer.decode(ids, skip_special_tokens=False)


MISSING = [(), ("tokenizer.json",), ("vocab.json", "merges.txt"), ("added_tokens.json", "special_tokens_map.json")]


@pytest.mark.parametrize("missing", MISSING, ids=lambda names: " ".join(names) or "nothing")
def test_the_published_tokenizer_files_give_one_tokenizer(copy, missing):
    for name in missing:
        (copy / name).unlink()
    loaded = simsd.load(copy)
    ids = loaded.encode_prompt("a the")
    assert words(loaded, ids) == "<|im_start|>user\na the<|im_end|>\n<|im_start|>assistant\n"
    assert (ids[0], ids.count(256), ids.count(IM_END), len(ids)) == (258, 1, 1, 23)
    assert len(loaded.tokenizer.backend) == MASK_ID + 1
    assert loaded.banned_ids == list(range(MASK_ID, VOCABULARY))
    with pytest.raises(SimsdError, match=r"contains the mask token <\|MASK\|>"):
        loaded.encode_prompt("<|MASK|>")


@pytest.mark.parametrize("word", ["<|MASK|>", "<MASK>"])
def test_the_mask_token_comes_from_the_tokenizer_where_an_older_config_has_none(copy, word):
    edit_json(copy / "config.json", mask_token_id=None)
    file = copy / "tokenizer.json"
    file.write_text(file.read_text().replace("<|MASK|>", word))
    loaded = simsd.load(copy)
    assert (loaded.mask_token_id, len(loaded.tokenizer.backend)) == (MASK_ID, MASK_ID + 1)


def test_chat_template_jinja_is_read(copy):
    fields = json.loads((copy / "tokenizer_config.json").read_text())
    template = fields.pop("chat_template")
    (copy / "tokenizer_config.json").write_text(json.dumps(fields))
    plain = simsd.load(copy)
    assert words(plain, plain.encode_prompt("hi")) == "hi"
    (copy / "chat_template.jinja").write_text(template)
    chat = simsd.load(copy)
    assert words(chat, chat.encode_prompt("hi")) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


# Odd but real files


def both(folder: Path, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the folder as simsd and as transformers load it."""
    with torch.no_grad():
        loaded = simsd.load(folder, dtype="float32").model(tokens).logits
        return loaded, AutoModelForCausalLM.from_pretrained(folder, dtype="float32")(tokens).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["none", "equal", "other"])
def test_a_head_in_the_file_counts_whatever_the_config_ties(copy, tokens, tied, head):
    edit_json(copy / "config.json", tie_word_embeddings=tied)
    tensors = load_file(copy / "model.safetensors")
    own = tensors.pop("lm_head.weight")
    embedding = tensors["model.embed_tokens.weight"]
    if head != "none":
        tensors["lm_head.weight"] = own if head == "other" else embedding.clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    if head == "none" and not tied:
        with pytest.raises(SimsdError, match=r"tensors are missing: lm_head\.weight"):
            simsd.load(copy)
        return
    torch.testing.assert_close(*both(copy, tokens), atol=1e-4, rtol=1e-4)
    expected = own if head == "other" else embedding
    assert torch.equal(simsd.load(copy).model.lm_head.weight, expected)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_either_name_of_the_dtype_is_read(copy, name):
    fields = json.loads((copy / "config.json").read_text())
    fields[name] = fields.pop("torch_dtype")
    (copy / "config.json").write_text(json.dumps(fields))
    loaded, auto = simsd.load(copy), AutoModelForCausalLM.from_pretrained(copy)
    assert loaded.dtype == auto.dtype == loaded.model.config.dtype == torch.bfloat16


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "rope_scaling_null": {"rope_theta": 10000.0, "rope_scaling": None},
    "rope_scaling_type": {"rope_theta": 10000.0, "rope_scaling": {"type": "yarn", **YARN}},
    "rope_scaling": {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "yarn", **YARN}},
    "rope_parameters": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN}},
}


def test_every_spelling_of_rope_is_read(copy, tokens):
    fields = json.loads((copy / "config.json").read_text())
    del fields["rope_scaling"], fields["rope_theta"]
    logits = {}
    for name, rope in ROPES.items():
        (copy / "config.json").write_text(json.dumps(fields | rope))
        logits[name], auto = both(copy, tokens)
        torch.testing.assert_close(logits[name], auto, atol=1e-4, rtol=1e-4)
    scaled = logits["rope_parameters"]
    assert torch.equal(logits["rope_scaling_type"], scaled) and torch.equal(logits["rope_scaling"], scaled)
    assert not torch.allclose(logits["rope_scaling_null"], scaled, atol=1e-2)
