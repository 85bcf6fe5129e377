"""`model.generate` on a random pair: fixtures and stand-ins of tests/test_hf*.py."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, StoppingCriteria

import simsd
from stand_ins import END, VOCABULARY, random_sdar

PAD = 0
PROMPT = [5, 3, 9, 8, 7, 6]
NEW = 18
MANY = 256  # rows for drafted states; without max_rows their number follows measured times
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9}


@pytest.fixture(scope="module")
def draft():
    """One that agrees with the target often, but not always."""
    loaded = random_sdar(0)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in loaded.model.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return loaded


@pytest.fixture(scope="module")
def tokenizer():
    """Every id is a word of two letters, written without spaces."""
    words = [chr(ord("a") + i // 8) + chr(ord("a") + i % 8) for i in range(VOCABULARY)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=words[END], pad_token=words[PAD])


@pytest.fixture
def run(target, draft):
    """`generate` with the draft; rows of ids, or a prompt's ids."""

    def generate(rows=PROMPT, **settings):
        ids = torch.tensor(rows if isinstance(rows[0], list) else [rows])
        settings = {"max_new_tokens": NEW, "assistant_model": draft.model} | settings
        if settings["max_new_tokens"] is None:
            del settings["max_new_tokens"]
        return target.model.generate(ids, **settings)

    return generate


@pytest.fixture(scope="module")
def greedy(target, draft) -> list[int]:
    config = simsd.GenerationConfig(max_new_tokens=NEW, drafter="model", max_rows=MANY)
    [result] = simsd.generate(target, [PROMPT], draft, config)
    assert 0 < result.stats.accepted < result.stats.drafted
    return result.tokens


def padded(rows: list[list[int]], side: str) -> tuple[list[list[int]], torch.Tensor]:
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(row)) for row in rows]
    order = 1 if side == "right" else -1
    pairs = [(row, pad)[::order] for row, pad in zip(rows, fill, strict=True)]
    counted = [([1] * len(row), [0] * len(pad))[::order] for row, pad in zip(rows, fill, strict=True)]
    return [a + b for a, b in pairs], torch.tensor([a + b for a, b in counted])


class StopAt(StoppingCriteria):
    """Holds where the text is `length` tokens long; records every length that it was asked about."""

    def __init__(self, length: int):
        self.length, self.asked = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.shape[1])
        return torch.full((len(input_ids),), input_ids.shape[1] == self.length)
