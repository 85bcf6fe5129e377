# ruff: noqa: F811 (fixtures are imported by name)
"""A plain `model.generate` on the models that transformers' own loaders and pipelines give, and other assistants."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, pipeline

import simsd
from hf_runs import MANY, NEW, PROMPT, draft, greedy, run, tokenizer  # noqa: F401
from simsd import SimsdError, hf
from simsd.models.families.sdar import SDARMoeConfig, SDARMoeForCausalLM
from stand_ins import MASK, random_sdar

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}


def stock_qwen3(loaded: simsd.LoadedModel) -> Qwen3ForCausalLM:
    """Its weights in transformers' own class, whose configuration records neither block length nor mask token."""
    names = Qwen3Config().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    config = {name: value for name, value in loaded.config.to_dict().items() if name in names}
    module = Qwen3ForCausalLM(Qwen3Config(**config)).train()
    module.load_state_dict(loaded.model.state_dict())
    return module


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"verify": "temporal", "accept": "mrs", "do_sample": True, "seed": 4},
        {"strategy": "low_confidence_dynamic", "threshold": 0.3, "steps": 2, "block_length": 8, "drafter": "self"},
        {"do_sample": True, "num_return_sequences": 2, "seed": 1, "top_k": 9},
        {"eos_token_id": 7, "pad_token_id": 33},
    ],
    ids=lambda settings: "_".join(settings) or "defaults",
)
def test_a_plain_generate_is_that_with_our_custom_generate(run, settings):
    rows = [PROMPT, [7] * len(PROMPT)]
    plain = run(rows, return_dict_in_generate=True, **settings)
    named = run(rows, return_dict_in_generate=True, custom_generate=simsd.hf_generate, **settings)
    assert plain.sequences.tolist() == named.sequences.tolist()
    assert [(r.step_map, r.probs) for r in plain.results] == [(r.step_map, r.probs) for r in named.results]


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_model_of_transformers_own_loader_generates_as_ours(tmp_path, target, moe):
    if moe:
        torch.manual_seed(0)
        SDARMoeForCausalLM(SDARMoeConfig(**target.config.to_dict() | EXPERTS)).save_pretrained(tmp_path)
    else:
        target.model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = simsd.load(tmp_path, deterministic=False)
    assert type(model) is type(loaded.model)
    inputs = {"input_ids": torch.tensor([PROMPT]), "attention_mask": torch.ones(1, len(PROMPT))}
    [result] = simsd.generate(loaded, [PROMPT], config=simsd.GenerationConfig(max_new_tokens=NEW))
    assert model.generate(**inputs, max_new_tokens=NEW).tolist() == [PROMPT + result.tokens]


def test_a_misspelt_setting_is_refused(run):
    with pytest.raises(ValueError, match="verfy"):
        run(verfy="none")


def test_continuous_batching_is_refused(target):
    for call in (
        lambda: target.model.generate_batch([PROMPT], max_new_tokens=4),
        lambda: target.model.generate(torch.tensor([PROMPT]), cache_implementation="paged", max_new_tokens=4),
    ):
        with pytest.raises(SimsdError, match="continuous batching decodes token by token"):
            call()


@pytest.fixture(scope="module")
def tiny():
    return simsd.load("tiny-target"), simsd.load("tiny-draft")


@pytest.fixture
def pipe(tiny, caplog):
    """transformers' text-generation pipeline of the built-in pair; it has nothing to complain of."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield pipeline("text-generation", model=tiny[0].model, tokenizer=tiny[0].tokenizer.backend)
    logger.removeHandler(caplog.handler)
    assert not [record.message for record in caplog.records if "not supported" in record.message]


QUESTION = "What is 27 + 14?"


def chat(question):
    return [{"role": "user", "content": question}]


def answer(tiny, question, **settings):
    config = simsd.GenerationConfig(max_new_tokens=24, **settings)
    return simsd.generate(tiny[0], question, tiny[1], config)[0].text


@pytest.mark.parametrize("settings", [{}, {"verify": "temporal"}], ids=["defaults", "temporal"])
def test_a_pipeline_answers_as_simsd_generate(pipe, tiny, settings):
    given = {"max_new_tokens": 24, "do_sample": False, "assistant_model": tiny[1].model} | settings
    [reply] = pipe(chat(QUESTION), **given)
    assert reply["generated_text"][-1] == {"role": "assistant", "content": answer(tiny, QUESTION, **settings)}
    questions = [QUESTION, "Which number follows 8?"]
    replies = pipe([chat(question) for question in questions], batch_size=2, return_full_text=False, **given)
    texts = [reply["generated_text"] for [reply] in replies]
    assert texts == [answer(tiny, question, **settings) for question in questions] and all(texts)


def test_a_pipeline_samples_stops_and_takes_an_assistant_when_it_is_made(pipe, tiny):
    words = tiny[0].tokenizer.backend
    made = pipeline("text-generation", model=tiny[0].model, tokenizer=words, assistant_model=tiny[1].model)
    text = answer(tiny, QUESTION)
    stop = text[len(text) // 2]
    settings = {"max_new_tokens": 24, "do_sample": False, "stop_strings": stop, "tokenizer": words}
    [reply] = made(chat(QUESTION), return_full_text=False, **settings)
    cut = reply["generated_text"]
    assert stop in cut and text.startswith(cut) and len(cut) < len(text)
    replies = pipe(chat(QUESTION), max_new_tokens=24, num_return_sequences=3, temperature=1.5)
    assert len({reply["generated_text"][-1]["content"] for reply in replies}) > 1


def test_what_a_pipeline_passes_on_is_refused_by_name(pipe):
    with pytest.raises(SimsdError, match="repetition_penalty=1.2"):
        pipe(chat(QUESTION), max_new_tokens=4, repetition_penalty=1.2)


def test_a_loaded_model_serves_as_assistant_too(run, draft, greedy):
    assert run(assistant_model=draft).tolist() == [PROMPT + greedy]


@pytest.mark.parametrize("block_length", [4, 8])
def test_a_stock_module_serves_as_assistant_and_keeps_its_weights(draft, monkeypatch, block_length):
    """It takes the target's block length and mask token, and drafts as the same weights in our class do."""
    target = random_sdar(0, block_length=block_length)
    module = stock_qwen3(draft)
    loaded = []
    monkeypatch.setattr(hf, "load", lambda *args, **kwargs: loaded.append(simsd.load(*args, **kwargs)) or loaded[-1])

    def generate(assistant):
        output = target.model.generate(
            torch.tensor([PROMPT]),
            assistant_model=assistant,
            max_new_tokens=NEW,
            drafter="model",
            max_rows=MANY,
            return_dict_in_generate=True,
        )
        return output.results[0]

    result = generate(module)
    assert [p.data_ptr() for p in loaded[-1].model.parameters()] == [p.data_ptr() for p in module.parameters()]
    expected = generate(simsd.load(draft.model, block_length=block_length))
    assert result.tokens == expected.tokens
    assert 0 < result.stats.accepted == expected.stats.accepted < result.stats.drafted
    assert module.training and type(module) is Qwen3ForCausalLM


def test_a_stock_module_of_another_vocabulary_or_shape_is_refused_in_one_line(run, draft):
    with pytest.raises(SimsdError, match="vocab size 96 against 64"):
        run(assistant_model=stock_qwen3(random_sdar(1, vocab_size=96)))
    with pytest.raises(SimsdError, match=r"Linear has no \.config"):
        run(assistant_model=torch.nn.Linear(2, 2))
    with pytest.raises(SimsdError, match="load takes a name, a folder, a hub id or a module, got int"):
        run(assistant_model=3)


def test_a_folder_serves_as_assistant(run, draft, greedy, tmp_path):
    draft.model.save_pretrained(tmp_path)
    assert run(assistant_model=str(tmp_path), drafter="model", max_rows=MANY).tolist() == [PROMPT + greedy]


def test_called_on_a_foreign_model_it_says_what_to_do(target):
    model = stock_qwen3(target)
    with pytest.raises(SimsdError, match=r"use simsd\.load\(model, mask_token_id=\.\.\.\)\.model\.generate"):
        model.generate(torch.tensor([PROMPT]), custom_generate=simsd.hf_generate, max_new_tokens=4)
    ours = simsd.load(model, mask_token_id=MASK, block_length=4).model
    for settings in ({"max_new_tokens": NEW}, {"max_new_tokens": NEW, "verify": "none"}):
        expected = target.model.generate(torch.tensor([PROMPT]), **settings)
        assert torch.equal(ours.generate(torch.tensor([PROMPT]), **settings), expected)


def test_other_custom_loops_receive_what_their_signature_names(target, draft):
    seen = {}

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, assistant_model=None, **kwargs):
        seen.update(assistant_model=assistant_model, names=set(kwargs))
        return input_ids

    target.model.generate(torch.tensor([PROMPT]), custom_generate=loop, assistant_model=draft.model, max_new_tokens=4)
    assert seen["assistant_model"] is draft.model
    assert "tokenizer" not in seen["names"]
