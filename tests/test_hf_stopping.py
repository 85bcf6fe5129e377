# ruff: noqa: F811 (fixtures are imported by name)
"""Stop strings, stopping criteria and max_time in `model.generate`."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_runs import NEW, PROMPT, StopAt, draft, greedy, run, tokenizer  # noqa: F401
from simsd.models.generation import StopStrings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("where", ["argument", "generation_config", "model"])
def test_stop_strings_cut_behind_the_token_that_completes_them(run, target, greedy, tokenizer, where):
    words = tokenizer.convert_ids_to_tokens(greedy)
    # Across two tokens, from the middle of the first to the middle of the second.
    string = words[4][1] + words[5][0]
    expected = next(n for n in range(len(words)) if string in "".join(words[: n + 1]))
    settings = {"tokenizer": tokenizer, "return_dict_in_generate": True}
    if where == "argument":
        output = run(**settings, stop_strings=[string])
    elif where == "generation_config":
        config = GenerationConfig(max_new_tokens=NEW, stop_strings=string, return_dict_in_generate=True)
        output = run(max_new_tokens=None, tokenizer=tokenizer, generation_config=config)
        assert config.stop_strings == string
    else:
        target.model.generation_config.stop_strings = string
        try:
            output = run(**settings)
        finally:
            target.model.generation_config.stop_strings = None
    assert output.sequences[0, len(PROMPT) :].tolist() == greedy[: expected + 1]
    [result] = output.results
    assert result.finish_reason == "stop" and result.text == "".join(words[: expected + 1])
    assert len(result.step_map) == len(result.probs) == len(result.origins) == result.stats.new_tokens == expected + 1


def test_a_stop_string_in_the_prompt_does_not_stop(run, greedy, tokenizer):
    prompt = tokenizer.convert_ids_to_tokens(PROMPT)
    assert run(stop_strings=[prompt[2], "".join(prompt)], tokenizer=tokenizer).tolist() == [PROMPT + greedy]


def test_stop_strings_see_bytes_special_tokens_and_repetitions():
    inner = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate([*pre_tokenizers.ByteLevel.alphabet(), "<e>"])}, [])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>")
    ids = torch.tensor([tokenizer.encode("x é = é<e>")])

    def stops(*strings):
        criterion = StopStrings(tokenizer, list(strings))
        return [n for n in range(1, ids.shape[1] + 1) if criterion(ids[:, :n])]

    assert stops("é") == [4, 9] and stops("é =") == [6] and stops("<e>", "x") == [1, 10] and stops("y") == []


def test_stop_strings_without_a_tokenizer_are_refused(run):
    with pytest.raises(ValueError, match="tokenizer"):
        run(stop_strings="ab")


@pytest.mark.parametrize("new", range(1, 8))
def test_a_stopping_criterion_cuts_at_any_token(run, greedy, new):
    criterion = StopAt(len(PROMPT) + new)
    assert run(stopping_criteria=StoppingCriteriaList([criterion])).tolist() == [PROMPT + greedy[:new]]
    assert criterion.asked == list(range(len(PROMPT) + 1, len(PROMPT) + new + 1))


@pytest.mark.parametrize("verify", ["exact", "temporal"])
def test_criteria_stop_each_row_for_itself(run, greedy, verify):
    class StopAtToken(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == greedy[3]

    rows = [PROMPT, [7] * len(PROMPT)]
    batch = run(rows, stopping_criteria=[StopAtToken()], pad_token_id=33, verify=verify)
    for row, ids in zip(rows, batch[:, len(PROMPT) :].tolist(), strict=True):
        alone = run(row, verify=verify)[0, len(PROMPT) :].tolist()
        kept = alone.index(greedy[3]) + 1 if greedy[3] in alone else len(alone)
        assert ids == alone[:kept] + [33] * (len(ids) - kept)


def test_a_criterion_at_the_end_token_leaves_the_finish_reason(run, greedy):
    criterion = StopAt(len(PROMPT) + greedy.index(greedy[6]) + 1)
    output = run(eos_token_id=greedy[6], stopping_criteria=[criterion], return_dict_in_generate=True)
    assert output.results[0].finish_reason == "end"


def test_criteria_see_one_row_and_each_of_its_tokens_once(run):
    seen: dict[int, list[list[int]]] = {}

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            assert len(input_ids) == 1
            seen.setdefault(int(input_ids[0, 0]), []).append(input_ids[0].tolist())
            return torch.tensor([False])

    rows = [PROMPT, [7] * len(PROMPT)]
    output = run(rows, stopping_criteria=[Watch()], return_dict_in_generate=True)
    for row, result in zip(rows, output.results, strict=True):
        assert seen[row[0]] == [row + result.tokens[: n + 1] for n in range(len(result.tokens))]


def test_a_criterion_that_raises_ends_the_call_and_the_model_can_go_on(run, greedy):
    class Broken(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise LookupError("the criterion's own")

    with pytest.raises(LookupError, match="the criterion's own"):
        run([PROMPT, [7] * len(PROMPT)], stopping_criteria=[Broken()])
    assert run().tolist() == [PROMPT + greedy]


def test_a_max_length_criterion_of_the_caller_is_honoured(run, greedy):
    assert run(stopping_criteria=[MaxLengthCriteria(len(PROMPT) + 3)]).tolist() == [PROMPT + greedy[:3]]


def test_max_time_ends_each_row_after_a_commit(run, greedy):
    for settings in ({"verify": "none"}, {"drafter": "self"}, {"verify": "temporal"}):
        rows = [PROMPT, [7] * len(PROMPT)]
        whole = run(rows, **settings, return_dict_in_generate=True).results
        results = run(rows, **settings, max_time=1e-6, return_dict_in_generate=True).results
        for result, full in zip(results, whole, strict=True):
            assert 1 <= len(result.tokens) <= 4 and result.tokens == full.tokens[: len(result.tokens)]
            assert result.finish_reason == "stop"
    assert run(max_time=1000.0).tolist() == [PROMPT + greedy]
