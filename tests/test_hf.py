"""`model.generate(custom_generate=simsd.hf_generate)`: transformers' settings, honoured or refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextStreamer,
    WatermarkingConfig,
)
from transformers.generation import BaseStreamer

import simsd
from simsd import SimsdError
from simsd.models.generation import StopStrings
from stand_ins import END, MASK, VOCABULARY, random_sdar

PAD = 0
PROMPT = [5, 3, 9, 8, 7, 6]
NEW = 18
MANY = 256  # rows for drafted states; without max_rows their number follows measured times


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def target():
    return random_sdar(0)


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
        return target.model.generate(ids, custom_generate=simsd.hf_generate, **settings)

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


class Recorder(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


class StopAt(StoppingCriteria):
    """Holds where the text is `length` tokens long; records every length that it was asked about."""

    def __init__(self, length: int):
        self.length, self.asked = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.shape[1])
        return torch.full((len(input_ids),), input_ids.shape[1] == self.length)


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strategy": "sequential", "steps": 2},
        {"drafter": "model", "lookahead": 3, "max_rows": 24, "draft_steps": 2},
        {"drafter": "self", "strategy": "low_confidence_dynamic", "threshold": 0.3},
        {"verify": "temporal"},
        {"verify": "temporal", "strategy": "entropy_bounded", "entropy_bound": 1.0, "rejected_tail": "target_argmax"},
        {"verify": "temporal", "strategy": "low_confidence_dynamic", "threshold": 0.3, "draft_steps": 2},
        {"verify": "temporal", "block_length": 8, "rejected_tail": "truncate_no_bonus", "end_gate": 0.5},
        {"verify": "temporal", "accept": "mrs"},
        {"verify": "none"},
    ],
    ids=lambda settings: "_".join(map(str, settings.values())) or "defaults",
)
def test_the_tokens_are_those_of_simsd_generate(target, draft, run, settings):
    [expected] = simsd.generate(target, [PROMPT], draft, simsd.GenerationConfig(max_new_tokens=NEW, **settings))
    assert run(**settings).tolist() == [PROMPT + expected.tokens]


@pytest.mark.parametrize("assistant", [True, False], ids=["assistant", "alone"])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 4}], ids=["greedy", "sampling"])
def test_by_default_the_text_is_that_of_native_decoding(run, draft, assistant, sampling):
    settings = {"return_dict_in_generate": True} | sampling
    native = run(verify="none", **settings)
    ours = run(assistant_model=draft.model if assistant else None, **settings)
    assert ours.sequences.tolist() == native.sequences.tolist()
    assert ours.results[0].step_map == native.results[0].step_map
    assert ours.results[0].probs == native.results[0].probs
    assert ours.results[0].stats.target_forwards <= native.results[0].stats.target_forwards


def test_without_an_assistant_the_model_drafts_for_itself(run):
    # Not `auto`: whether a draft pays it tells from measured times.
    [result] = run(assistant_model=None, drafter="self", max_rows=MANY, return_dict_in_generate=True).results
    assert result.stats.draft_forwards == 0 and result.stats.accepted > 0 and "drafted" in result.origins


def test_temporal_verification_without_an_assistant_decodes_natively(run):
    native = run(verify="none")
    output = run(assistant_model=None, verify="temporal", return_dict_in_generate=True)
    assert output.sequences.tolist() == native.tolist()
    assert set(output.results[0].origins) == {"denoised"}


@pytest.mark.parametrize(
    ("settings", "origins"),
    [({"drafter": "model", "max_rows": MANY}, {"denoised", "drafted"}), ({"verify": "temporal"}, {"drafted", "bonus"})],
    ids=["exact", "temporal"],
)
def test_the_named_verifier_judges_the_assistants_drafts(run, settings, origins):
    [result] = run(return_dict_in_generate=True, **settings).results
    assert result.stats.draft_forwards > 0 and result.stats.accepted > 0
    assert set(result.origins) == origins


def test_lookahead_and_rows_change_the_work_and_not_the_text(target, run, greedy):
    def forwards(**settings):
        perfect = {"drafter": "model", "assistant_model": target.model, "draft_steps": 4}
        output = run(return_dict_in_generate=True, **perfect, **settings)
        assert output.sequences.tolist() == [PROMPT + greedy]
        return output.results[0].stats.target_forwards

    one_block = forwards(lookahead=1, max_rows=MANY)
    assert forwards(lookahead=3, max_rows=MANY) < one_block < forwards(max_rows=0)


def test_the_output_tells_how_it_came(run, greedy):
    output = run(drafter="model", max_rows=MANY, return_dict_in_generate=True)
    [result] = output.results
    assert output.sequences.tolist() == [PROMPT + greedy]
    assert result.tokens == greedy and result.prompt_tokens == PROMPT and result.finish_reason == "length"
    assert result.stats.target_verify_forwards > 0 and result.stats.draft_forwards > 0
    assert output["sequences"] is output.sequences and output.scores is None


def test_a_loaded_model_serves_as_assistant_too(run, draft, greedy):
    assert run(assistant_model=draft).tolist() == [PROMPT + greedy]


def test_the_models_themselves_decode_and_no_copy(target):
    assert simsd.load(target.model).model is target.model


def test_other_attention_implementations_and_training_mode_are_no_obstacle(target, greedy, draft):
    config = copy.deepcopy(target.model.config)
    model = type(target.model)._from_config(config, attn_implementation="sdpa").train()
    model.load_state_dict(target.model.state_dict())
    output = model.generate(
        torch.tensor([PROMPT]), custom_generate=simsd.hf_generate, assistant_model=draft.model, max_new_tokens=NEW
    )
    assert output.tolist() == [PROMPT + greedy]
    assert model.training and model.config._attn_implementation == "sdpa"


ROWS = [PROMPT, [7], list(range(10, 19)), [4, 4]]
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("verify", ["exact", "temporal", "none"])
@pytest.mark.parametrize("sampling", [{}, SAMPLING | {"seed": 9}], ids=["greedy", "sampling"])
def test_each_row_of_a_padded_batch_equals_the_row_alone(run, side, verify, sampling):
    settings = {"verify": verify, "return_dict_in_generate": True} | sampling
    ids, mask = padded(ROWS, side)
    batch = run(ids, attention_mask=mask, **settings)
    assert batch.sequences[:, : mask.shape[1]].tolist() == ids
    for row, given, result in zip(batch.sequences[:, mask.shape[1] :].tolist(), ROWS, batch.results, strict=True):
        alone = run(given, **settings).results[0]
        assert row == alone.tokens + [PAD] * (len(row) - len(alone.tokens))
        assert (result.tokens, result.step_map, result.probs) == (alone.tokens, alone.step_map, alone.probs)


def test_rows_of_a_batch_share_their_forwards(run, target):
    calls = []
    hook = target.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    ids, mask = padded(ROWS, "left")
    try:
        results = run(ids, attention_mask=mask, verify="none", return_dict_in_generate=True).results
    finally:
        hook.remove()
    assert len(calls) == max(result.stats.target_forwards for result in results)


def test_pads_without_a_mask_are_recognised_as_transformers_does(run):
    ids, mask = padded([PROMPT, [7, 8]], "left")
    assert torch.equal(run(ids), run(ids, attention_mask=mask))


def test_rows_that_end_early_are_padded_on_the_right(run, greedy):
    rows = [PROMPT, [7] * len(PROMPT)]
    end = greedy[4]
    batch = run(rows, eos_token_id=end, pad_token_id=33)[:, len(PROMPT) :].tolist()
    for row, ids in zip(rows, batch, strict=True):
        alone = run(row, eos_token_id=end)[0, len(PROMPT) :].tolist()
        assert ids == alone + [33] * (len(ids) - len(alone))
    assert batch[0] == greedy[: greedy.index(end) + 1] + [33] * (len(batch[0]) - greedy.index(end) - 1)


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


def test_ids_past_the_tokenizer_are_never_generated(run, greedy, tokenizer):
    last = max(greedy)
    words = {word: i for word, i in tokenizer.get_vocab().items() if i < last}
    shorter = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="aa")))
    assert max(run(tokenizer=shorter)[0].tolist()) < last


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


def test_a_model_that_fails_is_not_silent(target, draft):
    model = copy.deepcopy(target.model)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"not finite in rows \[0\]"):
        output = model.generate(
            torch.tensor([PROMPT]), custom_generate=simsd.hf_generate, max_new_tokens=NEW, return_dict_in_generate=True
        )
    assert output.results[0].finish_reason == "failed"


@pytest.mark.parametrize("settings", [{}, {"stopping_criteria": [StopAt(len(PROMPT) + 6)]}], ids=["length", "stopped"])
def test_a_streamer_receives_exactly_the_output(run, settings):
    streamer = Recorder()
    output = run(streamer=streamer, **settings)
    assert streamer.ended and streamer.parts[0] == PROMPT
    assert [token for part in streamer.parts for token in part] == output[0].tolist()


def test_a_text_streamer_prints_the_text(run, greedy, tokenizer, capsys):
    run(streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(greedy)


def test_a_streamer_takes_one_row(run):
    with pytest.raises(SimsdError, match="streamer takes one row, got 2"):
        run([PROMPT, PROMPT], streamer=Recorder())


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
        [alone] = run(**SAMPLING, seed=11 + n).tolist()
        assert seeded[n][: len(alone)] == alone
    one_each = run(rows, **SAMPLING, num_return_sequences=3, seed=[11, 12, 13, 11, 12, 13]).tolist()
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
        ({"drafter": "me"}, "drafter must be one of auto, model, self; got 'me'"),
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
    with pytest.raises(SimsdError, match="past_key_values"):
        run(past_key_values=DynamicCache(config=target.model.config))


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


def test_called_on_a_foreign_model_it_says_what_to_do():
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, **heads)
    )
    with pytest.raises(SimsdError, match="simsd.load"):
        model.generate(torch.tensor([PROMPT]), custom_generate=simsd.hf_generate, max_new_tokens=4)


def test_other_custom_loops_receive_what_their_signature_names(target, draft):
    seen = {}

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, assistant_model=None, **kwargs):
        seen.update(assistant_model=assistant_model, names=set(kwargs))
        return input_ids

    target.model.generate(torch.tensor([PROMPT]), custom_generate=loop, assistant_model=draft.model, max_new_tokens=4)
    assert seen["assistant_model"] is draft.model
    assert "tokenizer" not in seen["names"]
