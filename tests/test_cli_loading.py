"""What commands are told of checkpoints that do not say it themselves: plain qwen3, qwen2 and llama folders."""

from __future__ import annotations

import json

import pytest

import byte_pair
import simsd
from plain_checkpoints import PLAIN, write_plain
from small_checkpoints import edit_json

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT, SHORT = "2 + 3", ("--max-new-tokens", "12", "--json")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    return {name: write_plain(root / name, name) for name in PLAIN}


def tokens_of(outcome) -> list[int]:
    code, out, err = outcome
    assert code == 0, err
    return json.loads(out)["tokens"]


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_folder_decodes_once_its_family_and_blocks_are_named(run, folders, name):
    folder = folders[name]
    told = ("--target", folder, "--family", name, "--block-length", "8", *SHORT)
    texts = {}
    for shift in (False, True):
        loaded = simsd.load(folder, family=name, block_length=8, shift=shift)
        [expected] = simsd.generate(loaded, [PROMPT], max_new_tokens=12)
        texts[shift] = tokens_of(run("generate", PROMPT, *told, "--shift" if shift else "--no-shift"))
        assert texts[shift] == expected.tokens
    assert texts[True] != texts[False] == tokens_of(run("generate", PROMPT, *told))


def test_a_plain_draft_is_named_apart_from_its_target(run, folders, pair, assert_one_line_error):
    """A target that says all of itself, and a draft that does not."""
    asked = ("generate", PROMPT, *pair[:2], "--draft", folders["llama"], "--drafter", "model", *SHORT)
    assert_one_line_error(run(*asked, "--block-length", "4"), "'llama'", "--draft-family")
    assert_one_line_error(run(*asked, "--draft-family", "llama"), "block length 4", "32")
    told = (*asked, "--draft-family", "llama", "--block-length", "4")
    code, out, err = run(*told, "--draft-shift")
    assert code == 0 and json.loads(out)["stats"]["draft_forwards"] > 0, err
    assert json.loads(out)["tokens"] == tokens_of(run("generate", PROMPT, *pair[:2], "--verify", "none", *SHORT))


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_folder_alone_is_refused_with_the_options_that_it_needs(run, folders, name, assert_one_line_error):
    outcome = run("generate", PROMPT, "--target", folders[name])
    assert_one_line_error(outcome, f"model_type {name!r}", f"--family {name}", "block_length=", "shift=True")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--family", "gpt2"), ("family must be one of sdar", "'gpt2'")),
        (("--family", ""), ("family must be one of sdar", "''")),
        (("--family", "qwen3", "--block-length", "0"), ("block_length", "1", "64", "0")),
        (("--family", "qwen3", "--block-length", "65"), ("block_length", "64", "65")),
        (("--family", "qwen3", "--mask-token-id", "258"), ("mask_token_id", "257", "258")),
        (("--family", "qwen3", "--mask-token-id", "-1"), ("mask_token_id", "-1")),
        (("--family", "qwen3", "--mask-token-id", "mask"), ("--mask-token-id", "simsd generate --help")),
        (("--family", "qwen3", "--shift", "yes"), ("simsd generate --help",)),
        (("--family", "llama"), ("no place for", "q_norm")),
        (("--draft-family", "gpt2", "--family", "qwen3", "--draft", "tiny-draft"), ("family", "'gpt2'")),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_what_does_not_fit_the_folder_is_a_one_line_error(run, folders, arguments, parts, assert_one_line_error):
    assert_one_line_error(run("generate", PROMPT, "--target", folders["qwen3"], *arguments), *parts)


def test_a_folder_without_a_mask_token_asks_for_its_id(run, folders, tmp_path, assert_one_line_error):
    folder = write_plain(tmp_path / "unmasked", "qwen3")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace(byte_pair.MASK, "<|other|>"))
    edit_json(folder / "tokenizer_config.json", mask_token=None)
    told = ("generate", PROMPT, "--target", folder, "--family", "qwen3", "--block-length", "8", *SHORT)
    assert_one_line_error(run(*told), "mask_token_id=")
    same = ("generate", PROMPT, "--target", folders["qwen3"], "--family", "qwen3", "--block-length", "8", *SHORT)
    assert tokens_of(run(*told, "--mask-token-id", "256")) == tokens_of(run(*same))


def test_every_command_that_loads_models_takes_them(run, folders, tmp_path):
    told = ("--family", "qwen3", "--block-length", "8", "--mask-token-id", "256", "--shift", "--draft", "none")
    folder, prompts = folders["qwen3"], tmp_path / "prompts.txt"
    prompts.write_text("2 + 3\n")
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "2 + 3", "answer": "5"}\n')
    short = ("--max-new-tokens", "8", "--prompts", prompts)
    for command in (
        ("bench", "--target", folder, *told, *short, "--modes", "native,exact-self"),
        ("evaluate", questions, "--target", folder, *told, "--max-new-tokens", "8", "--modes", "native"),
        ("audit", "--target", folder, *told, *short, "--quick", "--verify", "exact", "--seeds", "50"),
    ):
        code, out, err = run(*command)
        assert code == 0, f"{command[0]}: {out} {err}"


def test_the_server_s_engine_and_lm_eval_s_model_take_them(folders):
    from simsd.cli.serve import _engine_of
    from simsd.config import EngineConfig

    settings = {"family": "qwen3", "mask_token_id": 256, "shift": True}
    common = {"model": str(folders["qwen3"]), "draft": None, "dtype": "auto", "device": "cpu", "block_length": 8}
    engine = _engine_of(common | settings, EngineConfig(block_length=8, max_batch=2))
    assert (engine.block_length, engine.target.block_length, engine.target.shift) == (8, 8, True)

    harness = pytest.importorskip("simsd.evaluate.harness")
    model = harness.SimsdLM(str(folders["qwen3"]), draft="none", block_length=8, max_length=128, **settings)
    assert (model.model.block_length, model.model.shift) == (8, True)
    with pytest.raises(simsd.SimsdError, match="mask_token_id"):
        harness.SimsdLM(str(folders["qwen3"]), draft="none", mask_token=256)


def test_weights_are_quantized_on_request(run, folders, assert_one_line_error):
    pytest.importorskip("torchao")
    folder = folders["qwen3"]
    told = ("generate", PROMPT, "--target", folder, "--family", "qwen3", "--block-length", "8", *SHORT)
    loaded = simsd.load(folder, family="qwen3", block_length=8, quantize="int8")
    [expected] = simsd.generate(loaded, [PROMPT], max_new_tokens=12)
    assert tokens_of(run(*told, "--quantize", "int8")) == expected.tokens
    assert_one_line_error(run(*told, "--quantize", "int3"), "quantize must be int8, int4, float8", "'int3'")


def test_revisions_and_offline_use_are_the_hub_s(run, folders, pair, monkeypatch, assert_one_line_error):
    told = ("generate", PROMPT, "--target", folders["qwen3"], "--family", "qwen3")
    assert_one_line_error(run(*told, "--revision", "v2"), "revision='v2' is for hub ids")
    drafted = ("generate", PROMPT, *pair, "--draft-revision", "v3")
    assert_one_line_error(run(*drafted), "revision='v3' is for hub ids", pair[3])
    asked = []

    def download(hub_id, **given):
        asked.append((hub_id, given["revision"], given["local_files_only"]))
        raise OSError("nothing is downloaded here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for more in ((), ("--revision", "v2"), ("--revision", "v2", "--local-files-only")):
        code, out, err = run("generate", PROMPT, "--target", "org/model", "--draft", "none", *more)
        assert (code, out, err.count("\n")) == (2, "", 1)
    assert asked == [("org/model", None, False), ("org/model", "v2", False), ("org/model", "v2", True)]


@pytest.mark.parametrize("command", ["generate", "chat", "bench", "evaluate", "audit", "serve"])
@pytest.mark.parametrize("width", [80, 120])
def test_help_shows_them_in_one_panel_that_fits(run, command, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = run(command, "--help")
    assert code == 0 and max(map(len, out.splitlines())) <= width
    panel = out.split("─ Models ─")[1].split("╰")[0]
    both = ("--dtype", "--device", "--quantize", "--block-length", "--mask-token-id", "--local-files-only")
    each = ("--family", "--shift", "--revision", "--draft-family", "--draft-shift", "--draft-revision")
    assert all(option in panel for option in (*both, *each))
