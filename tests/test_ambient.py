"""Text and probabilities do not depend on what the caller has switched on in torch, which stays as it was."""

from __future__ import annotations

import contextlib
import copy
import inspect

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

import simsd
from simsd.ambient import undisturbed
from stand_ins import disturbed, random_sdar

PROMPTS = [[5, 3, 9, 8, 7, 6], [7, 8]]
NEW = 10


@contextlib.contextmanager
def switched(setter, getter, value):
    """What the process has for all threads; also checks that it still is what the caller chose."""
    before = getter()
    setter(value)
    try:
        yield
        assert getter() == value
    finally:
        setter(before)


def default_dtype(dtype):
    return switched(torch.set_default_dtype, torch.get_default_dtype, dtype)


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def autocast(dtype):
    with torch.autocast("cpu", dtype=dtype):
        yield
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == dtype


AMBIENT = {
    "autocast_bfloat16": lambda: autocast(torch.bfloat16),
    "autocast_float16": lambda: autocast(torch.float16),
    "default_float16": lambda: default_dtype(torch.float16),
    "default_float64": lambda: default_dtype(torch.float64),
    "default_device": default_device,
    "device_context": lambda: torch.device("meta"),
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
    "deterministic": lambda: switched(
        torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled, True
    ),
}
SETTINGS = {
    "exact": {"drafter": "model", "max_rows": 256},
    "self": {"drafter": "self", "max_rows": 256},
    "none": {"verify": "none"},
    "sampled": {"drafter": "model", "max_rows": 256, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 3},
    "temporal": {"verify": "temporal", "rejected_tail": "target_argmax", "end_gate": 0.5},
    "mrs": {"verify": "temporal", "accept": "mrs", "temperature": 0.8},
}


@pytest.fixture(params=AMBIENT)
def ambient(request):
    return AMBIENT[request.param]


@pytest.fixture(scope="module")
def pair():
    return random_sdar(0), disturbed(random_sdar(0))


@pytest.fixture(scope="module")
def quiet(pair):
    """Texts and probabilities in a process that has switched on nothing, by name of the settings."""
    return {name: said(simsd.generate(pair[0], PROMPTS, pair[1], config(name))) for name in SETTINGS}


def config(name):
    return simsd.GenerationConfig(max_new_tokens=NEW, **SETTINGS[name])


def said(results):
    return [(result.tokens, result.probs, result.step_map, result.finish_reason) for result in results]


@pytest.mark.parametrize("settings", SETTINGS)
def test_generate_gives_the_quiet_text_whatever_is_switched_on(pair, quiet, ambient, settings):
    with ambient():
        assert said(simsd.generate(pair[0], PROMPTS, pair[1], config(settings))) == quiet[settings]


@pytest.mark.parametrize("settings", ["exact", "temporal"])
def test_a_stream_may_be_read_with_something_else_switched_on_at_each_update(pair, quiet, settings):
    updates = simsd.stream(pair[0], PROMPTS, pair[1], config(settings))
    results, names = {}, iter([*AMBIENT] * 10)
    while len(results) < len(PROMPTS):
        with AMBIENT[next(names)]():
            update = next(updates)
        # Nothing of the loop's own stays on in the caller's code between two updates.
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        if update.result:
            results[update.index] = update.result
    assert said(results[i] for i in range(len(PROMPTS))) == quiet[settings]


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 3}], ids=["greedy", "sampled"])
def test_hf_generate_gives_the_quiet_text_whatever_is_switched_on(pair, ambient, sampling):
    def generate():
        return pair[0].model.generate(
            torch.tensor(PROMPTS[:1], device="cpu"),
            custom_generate=simsd.hf_generate,
            assistant_model=pair[1].model,
            max_new_tokens=NEW,
            return_dict_in_generate=True,
            **sampling,
        )

    expected = generate()
    with ambient():
        output = generate()
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert said(output.results) == said(expected.results)


def test_an_unseeded_sample_follows_torchs_seed_whatever_is_switched_on(pair, ambient):
    def sample():
        torch.manual_seed(3)
        prompt = torch.tensor(PROMPTS[:1], device="cpu")
        settings = {"do_sample": True, "max_new_tokens": NEW, "verify": "none"}
        return pair[0].model.generate(prompt, custom_generate=simsd.hf_generate, **settings).tolist()

    expected = sample()
    with ambient():
        assert sample() == expected


@pytest.mark.parametrize("source", ["tiny-draft", "module"])
def test_a_model_loaded_with_something_switched_on_is_the_same_and_can_be_trained(ambient, source):
    module = random_sdar(0, attention_dropout=0.1).model.train()
    tokens = torch.arange(1, 40)[None]

    def load():
        return simsd.load(module if source == "module" else source)

    expected = load()
    with ambient():
        loaded = load()
    assert loaded.dtype == expected.dtype and loaded.deterministic == expected.deterministic
    logits = loaded.model(tokens).logits
    assert torch.equal(logits, expected.model(tokens).logits)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.model.parameters())


def test_loading_and_decoding_leave_torchs_generator_and_threads_alone(pair):
    state, threads = torch.get_rng_state(), (torch.get_num_threads(), torch.get_num_interop_threads())
    loaded = simsd.load("tiny-draft")
    simsd.load(copy.deepcopy(pair[0].model).train())
    for settings in SETTINGS:
        simsd.generate(pair[0], PROMPTS, pair[1], config(settings))
    simsd.generate(loaded, "2+2=", config=simsd.GenerationConfig(max_new_tokens=4, temperature=1.0))
    assert torch.equal(state, torch.get_rng_state())
    assert (torch.get_num_threads(), torch.get_num_interop_threads()) == threads


def test_a_module_made_in_inference_mode_can_be_loaded_and_decoded_outside_of_it(pair, quiet):
    with torch.inference_mode():
        module = copy.deepcopy(pair[0].model).train()
    assert said(simsd.generate(simsd.load(module), PROMPTS, pair[1], config("exact"))) == quiet["exact"]


def test_weights_made_in_inference_mode_are_loaded_and_decoded_in_it_and_outside(pair):
    """They have no version counters."""
    with torch.inference_mode():
        target, draft = random_sdar(0), disturbed(random_sdar(0))
        inside = simsd.generate(target, PROMPTS, draft, config("exact"))
    outside = simsd.generate(target, PROMPTS, draft, config("exact"))
    assert said(inside) == said(outside) == said(simsd.generate(random_sdar(0), PROMPTS, pair[1], config("exact")))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # newer names of gradient checkpointing
@pytest.mark.parametrize("settings", ["exact", "temporal"])
def test_models_put_into_training_mode_decode_as_in_evaluation_and_stay_in_it(quiet, settings):
    """Dropout and gradient checkpointing, as a training loop has them between two optimizer steps."""
    pair = random_sdar(0, attention_dropout=0.1), disturbed(random_sdar(0, attention_dropout=0.1))
    for loaded in pair:
        loaded.model.train()
        loaded.model.gradient_checkpointing_enable()
    assert said(simsd.generate(pair[0], PROMPTS, pair[1], config(settings))) == quiet[settings]
    assert all(loaded.model.training and loaded.model.is_gradient_checkpointing for loaded in pair)


@pytest.mark.skipif(
    " @ " in inspect.getsource(Qwen3RotaryEmbedding.forward), reason="this transformers' RoPE angles are a product, too"
)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_deterministic_model_does_not_depend_on_the_precision_of_float32_products(precision):
    target = simsd.load("tiny-target", deterministic=True)
    settings = simsd.GenerationConfig(max_new_tokens=NEW, verify="none")
    prompts = [[i % 300 + 5 for i in range(600)], [7, 8]]
    expected = said(simsd.generate(target, prompts, config=settings))
    with switched(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision, precision):
        assert said(simsd.generate(target, prompts, config=settings)) == expected


def test_what_was_switched_on_is_on_again_after_an_error():
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        with pytest.raises(LookupError), undisturbed():
            assert not torch.is_autocast_enabled("cpu") and torch.zeros(()).device.type == "cpu"
            raise LookupError
        assert torch.is_autocast_enabled("cpu") and torch.zeros(()).device.type == "meta"
