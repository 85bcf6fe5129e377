# ruff: noqa: F811 (fixtures are imported by name)
"""transformers' settings and simsd's in `model.generate`: honoured, or refused by name."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    WatermarkingConfig,
)

import simsd
from hf_runs import (  # noqa: F401
    NEW,
    PAD,
    PROMPT,
    SAMPLING,
    StopAt,
    draft,
    greedy,
    run,
    tokenizer,
)
from simsd import SimsdError
from simsd.models.cache import CACHE_ARGUMENT
from simsd.seeds import sample_seed
from stand_ins import END, MASK, VOCABULARY, random_sdar

pytestmark = pytest.mark.usefixtures("one_thread")


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize("as_list", [False, True])
def test_end_tokens_end_the_text(run, greedy, as_list):
    end = greedy[6]
    output = run(eos_token_id=[62, end] if as_list else end, return_dict_in_generate=True)
    assert output.sequences[0, len(PROMPT) :].tolist() == greedy[: greedy.index(end) + 1]
    assert output.results[0].finish_reason == "end"


def test_no_end_token_means_no_end(run, target, draft):
    config = simsd.GenerationConfig(max_new_tokens=40, end_token_ids=())
    [expected] = simsd.generate(target, [[END, 5]], draft, config)
    model_config = target.model.generation_config
    kept, model_config.eos_token_id = model_config.eos_token_id, None
    try:
        assert run([END, 5], max_new_tokens=40).tolist() == [[END, 5] + expected.tokens]
    finally:
        model_config.eos_token_id = kept


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_max_length_counts_the_prompt(run, greedy):
    assert run(max_new_tokens=None, max_length=len(PROMPT) + 5).tolist() == [PROMPT + greedy[:5]]
    assert run(max_new_tokens=None).tolist() == [PROMPT + run(max_new_tokens=20)[0, len(PROMPT) :].tolist()]


def test_a_generation_config_object_is_honoured(run, greedy):
    config = GenerationConfig(max_new_tokens=7, eos_token_id=END, pad_token_id=PAD)
    assert run(max_new_tokens=None, generation_config=config).tolist() == [PROMPT + greedy[:7]]


def test_ids_past_the_tokenizer_are_never_generated(run, greedy, tokenizer):
    last = max(greedy)
    words = {word: i for word, i in tokenizer.get_vocab().items() if i < last}
    shorter = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="aa")))
    assert max(run(tokenizer=shorter)[0].tolist()) < last


def test_sampling_follows_torchs_seed(run):
    def sample(seed, **settings):
        torch.manual_seed(seed)
        return run(**SAMPLING, **settings).tolist()

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)[0]) for seed in range(4)}) > 1
    torch.manual_seed(1)
    assert run(**SAMPLING).tolist() != run(**SAMPLING).tolist()


def test_greedy_decoding_leaves_torchs_generator_alone(run):
    state = torch.get_rng_state()
    run()
    assert torch.equal(state, torch.get_rng_state())


def test_a_given_seed_samples_as_simsd_generate(target, draft, run):
    for accept in ("match", "mrs"):
        rule = {"verify": "temporal", "accept": accept}
        config = simsd.GenerationConfig(max_new_tokens=NEW, temperature=0.9, top_k=20, top_p=0.9, seed=5, **rule)
        [expected] = simsd.generate(target, [PROMPT], draft, config)
        assert run(**SAMPLING, seed=5, **rule).tolist() == [PROMPT + expected.tokens]


def test_top_k_defaults_to_transformers_50_when_sampling(target, run):
    config = simsd.GenerationConfig(max_new_tokens=NEW, temperature=1.0, top_k=50, seed=2)
    [expected] = simsd.generate(target, [PROMPT], config=config)
    assert run(do_sample=True, seed=2, assistant_model=None).tolist() == [PROMPT + expected.tokens]


def test_several_sequences_per_prompt_differ_and_are_in_transformers_order(run):
    rows = [PROMPT, [7] * len(PROMPT)]
    torch.manual_seed(0)
    output = run(rows, **SAMPLING, num_return_sequences=3)
    assert output.shape[0] == 6
    assert output[:, : len(PROMPT)].tolist() == [rows[0]] * 3 + [rows[1]] * 3
    assert len({tuple(row) for row in output.tolist()}) == 6
    seeded = run(rows, **SAMPLING, num_return_sequences=3, seed=11).tolist()
    for n in range(3):
        [alone] = run(**SAMPLING, seed=sample_seed(11, n)).tolist()
        assert seeded[n][: len(alone)] == alone
    seeds = [sample_seed(11, n) for n in range(3)] * 2
    one_each = run(rows, **SAMPLING, num_return_sequences=3, seed=seeds).tolist()
    assert one_each == seeded


def test_several_greedy_sequences_are_refused_by_transformers(run):
    with pytest.raises(ValueError, match="num_return_sequences"):
        run(num_return_sequences=2)


REFUSED = {
    "num_beams": 2,
    "early_stopping": True,
    "length_penalty": 0.5,
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
    "constraints": [object()],
    "force_words_ids": [[[1, 2]]],
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "min_length": 3,
    "min_new_tokens": 3,
    "min_p": 0.1,
    "top_h": 0.5,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "repetition_penalty": 1.2,
    "encoder_repetition_penalty": 1.2,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[4]],
    "suppress_tokens": [4],
    "begin_suppress_tokens": [4],
    "forced_bos_token_id": 4,
    "forced_eos_token_id": 4,
    "sequence_bias": [[[4], 1.0]],
    "exponential_decay_length_penalty": (3, 1.1),
    "remove_invalid_values": True,
    "token_healing": True,
    "guidance_scale": 1.5,
    "watermarking_config": WatermarkingConfig(),
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "use_mtp": True,
    "num_assistant_tokens": 5,
    "assistant_confidence_threshold": 0.1,
    "use_cache": False,
    "cache_implementation": "static",
    "prefill_chunk_size": 4,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(run, field):
    with pytest.raises(ValueError, match=field.replace("token_", "token.")):
        run(return_dict_in_generate=True, **{field: REFUSED[field]})


def test_all_refused_fields_are_named_with_their_values(run):
    with pytest.raises(SimsdError, match=r"min_new_tokens=3, repetition_penalty=1.2"):
        run(min_new_tokens=3, repetition_penalty=1.2)


def test_neutral_values_are_taken(run, greedy):
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": 0.0, "guidance_scale": 1.0}
    neutral["renormalize_logits"] = True
    assert run(**neutral).tolist() == [PROMPT + greedy]
    assert run(**neutral, **SAMPLING, seed=3).tolist() == run(**SAMPLING, seed=3).tolist()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"logits_processor": LogitsProcessorList([Nothing()])}, "logits_processor Nothing"),
        ({"logits_processor": [TemperatureLogitsWarper(0.5)], "do_sample": True}, "TemperatureLogitsWarper"),
        ({"prefix_allowed_tokens_fn": lambda batch, ids: [4]}, "prefix_allowed_tokens_fn"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"assistant_tokenizer": object()}, "assistant_tokenizer"),
        ({"position_ids": torch.arange(3, 3 + len(PROMPT))[None]}, "position_ids"),
        ({"inputs_embeds": torch.zeros(1, len(PROMPT), 32)}, "inputs_embeds"),
        ({"clock": torch.zeros(1, len(PROMPT), dtype=torch.int32)}, "clock"),
        ({"not_a_setting": 3}, "not_a_setting"),
        ({"strategy": "random"}, "strategy must be one of"),
        ({"accept": "mrs"}, "accept='mrs' is a setting of verify='temporal'"),
        ({"drafter": "me"}, "drafter must be one of auto, model, self, lookup; got 'me'"),
        ({"drafter": "model", "assistant_model": None}, "drafter='model' needs a draft model"),
        ({"lookahead": 0}, "lookahead must be an integer in 1..16, got 0"),
        ({"max_rows": -1}, "max_rows must be an integer >= 0, got -1"),
        ({"steps": 5}, "steps must be at most the block length 4"),
        ({"temperature": 0.0, "do_sample": True}, "temperature"),
        ({"mask_token_id": VOCABULARY}, "mask_token_id"),
        ({"max_new_tokens": 1000}, "512"),
        ({"seed": [1, 2], "do_sample": True}, "seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_argument_that_cannot_be_honoured_is_refused_by_name(run, settings, name):
    with pytest.raises(ValueError, match=name):
        run(**settings)


def test_a_cache_of_the_caller_is_refused(run, target):
    with pytest.raises(SimsdError, match=CACHE_ARGUMENT):
        run(**{CACHE_ARGUMENT: DynamicCache(config=target.model.config)})


def test_a_prompt_with_the_mask_token_is_refused_before_anything_is_decoded(run):
    with pytest.raises(SimsdError, match="mask token"):
        run([PROMPT, [MASK] * len(PROMPT)], streamer=None)


def test_a_draft_of_another_vocabulary_is_refused(run):
    with pytest.raises(SimsdError, match="vocab size"):
        run(assistant_model=random_sdar(1, vocab_size=96).model)


def test_rows_of_unknown_lengths_need_a_pad_token(run, target):
    config = target.model.generation_config
    kept, (config.eos_token_id, config.pad_token_id) = (config.eos_token_id, config.pad_token_id), (None, None)
    try:
        assert run([PROMPT, PROMPT]).shape == (2, len(PROMPT) + NEW)
        with pytest.raises(SimsdError, match="pad_token_id"):
            run([PROMPT, PROMPT], stopping_criteria=[StopAt(10)])
    finally:
        config.eos_token_id, config.pad_token_id = kept
