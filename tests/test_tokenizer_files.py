"""Tokenizer files as they are published and as they get damaged: the ids are those of the files, or loading refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import simsd
from simsd import SimsdError
from simsd.models.families.sdar import SDARConfig, SDARForCausalLM
from simsd.models.tokenizer import known_ids, read_tokenizer
from small_checkpoints import BASE, edit_json, write_checkpoint

MASK = "<|MASK|>"
ENTRIES, HIGHEST = 1713, 1727  # of a tokenizer whose ids have gaps; the highest is the end token's
GAPS = list(range(1700, 1714)) + [1726]


def sparse_tokenizer() -> PreTrainedTokenizerFast:
    ids = [i for i in range(HIGHEST + 1) if i not in GAPS]
    words = {f"w{i}": i for i in ids} | {"<|end|>": ids[-1], MASK: ids[-2]}
    del words[f"w{ids[-1]}"], words[f"w{ids[-2]}"]
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", mask_token=MASK)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> Path:
    """A checkpoint padded past a tokenizer with gaps, whose model wants to write a gap, then the end token."""
    folder = tmp_path_factory.mktemp("sparse")
    sparse_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    settings = {name: value for name, value in BASE.items() if name not in ("rope_theta", "eos_token_id")}
    model = SDARForCausalLM(SDARConfig(**settings | {"vocab_size": 1760}, block_length=4)).eval()
    with torch.no_grad():
        block = torch.tensor([[5, 6, 7, HIGHEST - 2]])
        hidden = model(block, output_hidden_states=True).hidden_states[-1][0, 3]
        model.lm_head.weight *= 0.01
        model.lm_head.weight[HIGHEST] = hidden
        model.lm_head.weight[[1705, 1726, 1740]] = 2 * hidden
    model.save_pretrained(folder)
    return folder


def test_ids_without_an_entry_are_banned_and_the_end_token_is_not(sparse):
    loaded = simsd.load(sparse)
    assert len(loaded.tokenizer.ids) == ENTRIES and max(loaded.tokenizer.ids) == HIGHEST
    assert loaded.end_token_ids == (HIGHEST,) and loaded.mask_token_id == HIGHEST - 2
    assert loaded.banned_ids == sorted([*GAPS, HIGHEST - 2, *range(HIGHEST + 1, 1760)])


@pytest.mark.parametrize("settings", [{"verify": "none"}, {"drafter": "self"}, {"verify": "temporal"}], ids=str)
def test_a_text_ends_with_an_end_token_above_the_number_of_entries(sparse, settings):
    loaded = simsd.load(sparse)
    config = simsd.GenerationConfig(max_new_tokens=16, **settings)
    result = simsd.generate(loaded, [[5, 6, 7]], loaded, config)[0]
    assert (result.finish_reason, result.tokens) == ("end", [HIGHEST])


def test_transformers_generate_ends_there_too_and_bans_by_the_tokenizer_it_is_given(sparse):
    loaded = simsd.load(sparse)
    output = loaded.model.generate(
        torch.tensor([[5, 6, 7]]), custom_generate=simsd.hf_generate, tokenizer=loaded.tokenizer.backend,
        eos_token_id=HIGHEST, max_new_tokens=16,
    )  # fmt: skip
    assert output.tolist() == [[5, 6, 7, HIGHEST]]


def test_an_end_token_that_the_caller_chose_is_not_banned(sparse):
    config = simsd.GenerationConfig(max_new_tokens=16, end_token_ids=(1740,), verify="none")
    result = simsd.generate(simsd.load(sparse), [[5, 6, 7]], config=config)[0]
    assert (result.finish_reason, result.tokens) == ("end", [1740])


def test_a_tokenizer_is_too_large_by_its_highest_id_not_by_its_length(sparse, tmp_path):
    write_checkpoint(tmp_path, vocab_size=1720)
    with pytest.raises(SimsdError, match="the ids of its tokenizer go up to 1727, its model's to 1719"):
        simsd.load(tmp_path, tokenizer=sparse)


def test_tokens_added_later_are_known():
    tokenizer = sparse_tokenizer()
    before = known_ids(tokenizer)
    tokenizer.add_tokens(["later"])
    assert known_ids(tokenizer) == before | {tokenizer.convert_tokens_to_ids("later")}


# Qwen2's slow files, as SDAR's checkpoints have them: no tokenizer.json, and code that must not be run.

PIECES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {piece: i for i, piece in enumerate([*PIECES, "he", "ll", "llo", "Ġw"])}
MERGES = "#version: 0.2\nh e\nl l\nll o\nĠ w\n"
ADDED = {"<|endoftext|>": 260, "<|im_start|>": 261, "<|im_end|>": 262, "<think>": 263, MASK: 264}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def settings(added: dict[str, int]) -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {"content": token, **flags, "special": token != "<think>"} for token, i in added.items()
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", MASK],
        "auto_map": {"AutoTokenizer": ["tokenization_qwen2.Qwen2Tokenizer", None]},
        "bos_token": None,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "mask_token": MASK,
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(
        tmp_path, vocab_size=288, eos_token_id=ADDED["<|endoftext|>"], extra={"mask_token_id": ADDED[MASK]}
    )
    (tmp_path / "vocab.json").write_text(json.dumps(VOCABULARY))
    (tmp_path / "merges.txt").write_text(MERGES)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings(ADDED)))
    # Both are out of date in the published folders: this name is no token of the tokenizer.
    older = {token.replace(MASK, "<MASK>"): i for token, i in ADDED.items()}
    (tmp_path / "added_tokens.json").write_text(json.dumps(older))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<MASK>"]}))
    (tmp_path / "tokenization_qwen2.py").write_text("raise RuntimeError('this code must not be run')")
    return tmp_path


def test_published_slow_files_give_their_own_ids(folder):
    loaded = simsd.load(folder)
    ids = loaded.encode_prompt("hello w")
    assert ids == [261, *loaded.tokenizer.backend.encode("user\n"), 256, 258, 259, 262, PIECES.index("Ċ")]
    assert loaded.tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nhello w<|im_end|>\n"
    assert loaded.end_token_ids == (260,)
    assert loaded.banned_ids == [264, *range(265, 288)]


def test_a_template_in_a_file_of_its_own_is_used(folder):
    fields = settings(ADDED)
    del fields["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert simsd.load(folder).encode_prompt("hello w")[0] == 261


def added_with_a_gap(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings(ADDED | {MASK: 270})))


def added_in_the_old_file_only(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={})


DAMAGES = {
    "numbered_with_a_gap": (added_with_a_gap, r"give the token <\|MASK\|> the id 270, transformers reads 264"),
    "numbered_in_the_old_file_only": (added_in_the_old_file_only, r"give the token .* the id 26\d, transformers reads"),
    "no_vocabulary": (
        lambda folder: [(folder / name).unlink() for name in ("vocab.json", "merges.txt")],
        "holds no vocabulary: tokenizer.json, or vocab.json with merges.txt, is missing",
    ),
    "no_merges": (lambda folder: (folder / "merges.txt").unlink(), "the tokenizer cannot be read"),
    "no_vocab_json": (lambda folder: (folder / "vocab.json").unlink(), "the tokenizer cannot be read"),
    "vocab_json_cut": (lambda folder: (folder / "vocab.json").write_text('{"a": '), "the tokenizer cannot be read"),
    "config_cut": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"tokenizer_class": '),
        "the tokenizer cannot be read",
    ),
    "unknown_class": (
        lambda folder: edit_json(folder / "tokenizer_config.json", tokenizer_class="FooTokenizer", auto_map={}),
        "the tokenizer cannot be read",
    ),
    "class_of_its_own_code": (
        lambda folder: edit_json(folder / "tokenizer_config.json", tokenizer_class="FooTokenizer"),
        "the tokenizer cannot be read .*contains custom code",
    ),
    "only_added_tokens": (
        lambda folder: [(folder / name).unlink() for name in ("vocab.json", "merges.txt", "tokenizer_config.json")],
        "the tokenizer cannot be read",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_or_contradictory_files_are_refused_in_one_line(folder, case):
    damage, message = DAMAGES[case]
    damage(folder)
    with pytest.raises(SimsdError, match=message) as error:
        simsd.load(folder)
    assert "\n" not in str(error.value)


def test_a_tokenizer_json_saved_from_the_slow_files_is_read_without_them(folder):
    read_tokenizer(folder).save_pretrained(folder / "fast")
    assert not (folder / "fast" / "vocab.json").exists()
    loaded = simsd.load(folder, tokenizer=folder / "fast")
    assert loaded.encode_prompt("hello w") == simsd.load(folder).encode_prompt("hello w")
