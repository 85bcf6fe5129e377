"""What `simsd.generate` takes for prompts: everything that is one, and nothing else."""

from __future__ import annotations

import array

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import simsd
from simsd import SimsdError
from simsd.prompts import encode_prompts
from small_checkpoints import MASK_ID, write_checkpoint, write_tokenizer
from stand_ins import MASK, random_sdar

CHAT = [{"role": "user", "content": "a b"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts") / "small"
    write_checkpoint(folder)
    write_tokenizer(folder)
    return simsd.load(folder)


@pytest.fixture(scope="module")
def bare():
    """Without a tokenizer."""
    return random_sdar(0)


IDS = [
    ([5, 6], [[5, 6]]),
    ((5, 6), [[5, 6]]),
    (range(5, 7), [[5, 6]]),
    (array.array("i", [5, 6]), [[5, 6]]),
    (np.array([5, 6]), [[5, 6]]),
    (np.array([5, 6], dtype=np.uint8), [[5, 6]]),
    (torch.tensor([5, 6]), [[5, 6]]),
    (torch.tensor([5, 6], dtype=torch.int32), [[5, 6]]),
    ([np.int64(5), torch.tensor(6)], [[5, 6]]),
    ([[5, 6], [7]], [[5, 6], [7]]),
    (torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
    ([np.array([5, 6]), torch.tensor([7]), [8]], [[5, 6], [7], [8]]),
    ([torch.tensor([5])], [[5]]),
    ([], []),
    ([[]], [[]]),
    (torch.zeros(0, dtype=torch.int64), [[]]),
    (torch.zeros(2, 0, dtype=torch.int64), [[], []]),
]


@pytest.mark.parametrize(("prompts", "expected"), IDS, ids=[repr(prompts)[:40] for prompts, _ in IDS])
def test_ids_of_every_kind_are_the_ids(bare, prompts, expected):
    encoded = encode_prompts(bare, prompts)
    assert encoded == expected
    assert all(type(i) is int for prompt in encoded for i in prompt)
    results = simsd.generate(bare, prompts, max_new_tokens=1)
    assert [result.prompt_tokens for result in results] == expected


def test_one_chat_is_one_prompt_and_a_list_of_chats_are_many(model):
    one = model.encode_prompt(CHAT)
    assert encode_prompts(model, CHAT) == encode_prompts(model, [CHAT]) == encode_prompts(model, "a b") == [one]
    assert encode_prompts(model, [CHAT, "a b", CHAT[:1], one]) == [one] * 4
    assert encode_prompts(model, [*CHAT, {"role": "assistant", "content": "c"}]) != [one]


REFUSED = [
    (b"ab", "got bytes: decode it to a string"),
    (bytearray(b"ab"), "got bytearray: decode it"),
    (memoryview(b"ab"), "got memoryview: decode it"),
    ([b"ab"], "a prompt is a string, a chat or a list of token ids, got bytes: b'ab'"),
    (["a", bytearray(b"ab")], "prompt 1: a prompt is .*, got bytearray"),
    ({"role": "user", "content": "a"}, "got dict: a chat is a list of turns"),
    (BatchEncoding({"input_ids": [[5]]}), "got BatchEncoding: give its input_ids"),
    ((x for x in ["a"]), r"got generator: give list\(prompts\)"),
    ({5, 6}, r"got set: give list\(prompts\)"),
    ([{5, 6}], "got set"),
    (None, "prompts must be a string, a chat, a list of token ids, or a list of these, got NoneType"),
    ([None], "got NoneType"),
    (["a", None], "prompt 1: .*got NoneType"),
    (5, "got int"),
    (torch.tensor(5), "got int"),
    ([5, [6]], "cannot hold single token ids or turns of a chat, got int and list"),
    ([[5], 6], "got list and int"),
    (["a", 5], "got str and int"),
    ([*CHAT, "a"], "got dict and str"),
    ([5, *CHAT], "a prompt is a string, a chat or a list of token ids, got list"),
    ([[[5]]], "got list"),
    ([5, 6.0], "got list"),
    ([True], "got list"),
    (np.array([5.0]), "got list"),
    (torch.tensor([True]), "got list"),
    (np.array([[5.0]]), "got list"),
    ([[5], [6, "a"]], "prompt 1: "),
    ([{}], "a turn of a chat is"),
    ([{"role": "user"}], "a turn of a chat is"),
    ([{"role": "user", "content": b"a"}], "a turn of a chat is"),
    ([[5], [MASK_ID]], "prompt 1: the prompt contains the mask token"),
    ([5, 96], "token id 96, but ids go from 0 to 95"),
]


@pytest.mark.parametrize(("prompts", "message"), REFUSED, ids=map(str, range(len(REFUSED))))
def test_anything_else_is_refused_in_one_line(model, prompts, message):
    with pytest.raises(SimsdError, match=message) as error:
        simsd.generate(model, prompts, max_new_tokens=1)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize("prompts", ["a", ["a"], b"ab", [b"ab"], {"a": 1}, [CHAT], [MASK]], ids=repr)
def test_without_a_tokenizer_too(bare, prompts):
    with pytest.raises(SimsdError) as error:
        simsd.generate(bare, prompts, max_new_tokens=1)
    assert "\n" not in str(error.value)
