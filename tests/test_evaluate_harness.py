"""lm-eval's model `simsd`: by lm-eval's own command line, and request by request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval", reason='needs pip install "simsd-kernels[evaluate]"')

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

import simsd  # noqa: E402
import simsd.evaluate.__main__ as command_line  # noqa: E402
from simsd.evaluate.harness import SimsdLM  # noqa: E402
from simsd.evaluate.scoring import Scorer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = Path(__file__).parents[1] / "examples" / "evaluation"


@pytest.fixture(scope="module")
def lm() -> SimsdLM:
    return SimsdLM(pretrained="tiny-target", verify="exact", batch_size="4")


def generation(context: str, **kwargs) -> Instance:
    return Instance("generate_until", {}, (context, kwargs), 0)


def asked(lm: SimsdLM, question: str) -> str:
    return lm.apply_chat_template([{"role": "user", "content": question}])


FRANCE = "What is the capital of France?"


# The command line


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> dict[str, dict]:
    """lm-eval's results and samples, native and exact, of the local tasks; both processes at a time."""
    out = tmp_path_factory.mktemp("scored")
    running = {}
    for verify in ("none", "exact"):
        arguments = {
            "--model_args": f"pretrained=tiny-target,draft=tiny-draft,verify={verify}",
            "--tasks": "tiny_arithmetic,tiny_facts,tiny_choice",
            "--include_path": str(TASKS),
            "--gen_kwargs": "do_sample=true,temperature=2.0",  # where not all answers are right
            "--limit": "12",
            "--batch_size": "4",
            "--output_path": str(out / verify),
        }
        command = [sys.executable, "-m", "simsd.evaluate", "--model", "simsd", "--apply_chat_template", "--log_samples"]
        command += [part for argument in arguments.items() for part in argument]
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hub"), "OMP_NUM_THREADS": "1"}
        running[verify] = subprocess.Popen(
            command, env=os.environ | offline, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    found = {}
    for verify, process in running.items():
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
        (results,) = (out / verify).rglob("results_*.json")
        found[verify] = json.loads(results.read_text()) | {"printed": printed}
        found[verify]["texts"] = {
            file.name.split("_2")[0]: [json.loads(line)["resps"] for line in file.read_text().splitlines()]
            for file in sorted((out / verify).rglob("samples_*.jsonl"))
        }
    return found


def test_lm_eval_scores_native_and_exact_alike(scored):
    native, exact = scored["none"], scored["exact"]
    for task in ("tiny_arithmetic", "tiny_facts", "tiny_choice"):
        assert f"|{task}" in native["printed"]
        assert native["results"][task] == exact["results"][task]
        assert native["n-samples"][task]["effective"] == 12
    assert len(native["texts"]) == 3 and native["texts"] == exact["texts"]
    assert native["results"]["tiny_choice"]["acc,none"] == 1.0
    assert 0 < native["results"]["tiny_arithmetic"]["exact_match,number"] < 1  # or equality would say little
    forwards = [found["config"]["generation"]["target_forwards"] for found in (native, exact)]
    assert forwards[1] < 0.7 * forwards[0]
    assert exact["config"]["draft"] == "tiny-draft" and exact["config"]["sampling"]["verify"] == "exact"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model_args", "pretrained=tiny-target,verfy=exact", "--tasks", "tiny_facts"],
            "unknown setting 'verfy': did you mean verify?",
        ),
        (["--config", "/no/such/file", "--tasks", "tiny_facts"], "/no/such/file"),
    ],
    ids=["model argument", "configuration"],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["simsd.evaluate", "--model", "simsd", "--include_path", str(TASKS), *arguments])
    assert command_line.main() == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("simsd.evaluate: error: ") and message in err


# Arguments of the model


def test_lm_eval_finds_the_model_by_name():
    assert get_model("simsd") is SimsdLM
    made = get_model("simsd").create_from_arg_string(
        "pretrained=tiny-target,draft=none,verify=none,seed=3,block_length=2,lookahead=1,strategy=sequential",
        {"batch_size": 3},
    )
    assert (made.params.verify, made.params.seed, made.params.strategy) == ("none", 3, "sequential")
    assert (made.engine.config.max_batch, made.engine.block_length, made.engine.config.lookahead) == (3, 2, 1)
    assert made.engine.draft is None and made.scorer.block_length == 2
    assert get_model("simsd").create_from_arg_string("pretrained=tiny-target,draft=none").engine.draft is None


def test_a_built_in_draft_goes_with_its_target(lm):
    assert lm.engine.draft.name == "tiny-draft"
    assert SimsdLM(pretrained="long-target").engine.draft.name == "long-draft"
    assert SimsdLM(pretrained="tiny-target", draft="none").engine.draft is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pretrained="),
        ({"pretrained": "/no/such/model"}, "/no/such/model"),
        ({"pretrained": "tiny-target", "verify": "approximately"}, "exact, temporal, none; got 'approximately'"),
        ({"pretrained": "tiny-target", "drft": "tiny-draft"}, "unknown setting 'drft': did you mean draft"),
        ({"pretrained": "tiny-target", "temperature": 0.5}, "--gen_kwargs temperature="),
        ({"pretrained": "tiny-target", "max_new_tokens": 5}, "--gen_kwargs max_gen_toks="),
        ({"pretrained": "tiny-target", "batch_size": "many"}, "batch_size must be an integer >= 1 or auto, got 'many'"),
        ({"pretrained": "tiny-target", "batch_size": 0}, "max_batch must be an integer >= 1, got 0"),
        ({"pretrained": "tiny-target", "draft": "none", "verify": "temporal"}, "needs a draft model"),
        ({"pretrained": "tiny-target", "draft": "none", "drafter": "model"}, "needs a draft model"),
        ({"pretrained": "tiny-target", "trust_remote_code": True}, "trust_remote_code"),
        ({"pretrained": "tiny-target", "dtype": "int8"}, "'int8'"),
        ({"pretrained": "tiny-target", "steps": 9}, "steps must be at most the block length 4, got 9"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_model_arguments_are_refused_in_one_line(arguments, message):
    with pytest.raises(simsd.SimsdError) as refused:
        SimsdLM(**arguments)
    assert message in str(refused.value) and "\n" not in str(refused.value)


# Generation


def test_texts_are_the_engine_s_in_the_order_of_requests(lm):
    questions = [FRANCE, "What is the capital of Japan?", "What is the symbol of iron?", "What is the symbol of gold?"]
    texts = lm.generate_until([generation(asked(lm, q), max_gen_toks=32, until=[]) for q in questions], True)
    assert texts == [result.text for result in simsd.generate("tiny-target", questions, max_new_tokens=32)]
    assert texts[0] == "The capital of France is Paris."


@pytest.mark.parametrize("until", [" is", [" is"], ["", "zebra", " is", "Paris"]], ids=str)
def test_a_text_ends_before_its_first_stop_string(lm, until):
    assert lm.generate_until([generation(asked(lm, FRANCE), until=until)], True) == ["The capital of France"]


def test_a_text_ends_after_as_many_tokens_as_its_task_allows(lm):
    (short,) = lm.generate_until([generation(asked(lm, FRANCE), max_gen_toks=2, until=[])], True)
    (result,) = simsd.generate("tiny-target", FRANCE, max_new_tokens=2)
    assert short == result.text


def test_requests_of_one_batch_have_settings_of_their_own(lm):
    prompt = asked(lm, FRANCE)
    requests = [
        generation(prompt, until=[" of"]),
        generation(prompt, until=[], do_sample=True, temperature=5.0, seed=1, num_beams=1),
        generation(prompt, until=[], do_sample=True, temperature=5.0, seed=1, strategy="sequential"),
        generation(prompt, until=[], do_sample=False, temperature=5.0),
    ]
    texts = lm.generate_until(requests, True)
    assert texts[0] == "The capital" and texts[3] == "The capital of France is Paris."
    assert texts[1] == simsd.generate("tiny-target", FRANCE, temperature=5.0, seed=1)[0].text
    assert texts[2] == simsd.generate("tiny-target", FRANCE, temperature=5.0, seed=1, strategy="sequential")[0].text


def test_repeats_of_a_request_differ_and_come_again(lm):
    request = generation(asked(lm, FRANCE), until=[], do_sample=True, temperature=5.0, max_gen_toks=16)
    texts = lm.generate_until([request] * 3, True)
    assert len(set(texts)) == 3 and texts == lm.generate_until([request] * 3, True)
    samples = simsd.generate("tiny-target", FRANCE, temperature=5.0, max_new_tokens=16, n=3)
    assert texts == [sample.text for sample in samples]


def test_a_prompt_that_is_too_long_is_cut_on_the_left(caplog):
    short = SimsdLM(pretrained="tiny-target", max_length=64)
    long = "apples " * 100 + asked(short, FRANCE)
    assert short.generate_until([generation(long, max_gen_toks=16, until=[])], True)[0]
    (result,) = simsd.generate("tiny-target", [short.tok_encode(long)[-48:]], max_new_tokens=16)
    assert short.generate_until([generation(long, max_gen_toks=16, until=[])], True) == [result.text]
    assert "Truncating context" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"repetition_penalty": 1.2}, "unknown setting 'repetition_penalty'"),
        ({"num_beams": 4}, "unknown setting 'num_beams'"),
        ({"top_k": -1}, "top_k must be an integer >= 0, got -1"),
        ({"strategy": "best"}, "strategy must be one of"),
        ({"max_gen_toks": -1}, "max_new_tokens must be an integer >= 0, got -1"),
    ],
    ids=str,
)
def test_a_generation_setting_that_cannot_be_honoured_is_refused_before_anything_is_decoded(lm, kwargs, message):
    good = generation(asked(lm, FRANCE), until=[])
    with pytest.raises(simsd.SimsdError) as refused:
        lm.generate_until([good, generation("x", until=[], **kwargs)], True)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not lm.engine.busy


def test_a_request_that_the_engine_refuses_leaves_none_behind(lm):
    good = generation(asked(lm, FRANCE), until=[])
    with pytest.raises(simsd.SimsdError, match="mask token"):
        lm.generate_until([generation("x", until=[]), generation("a <|MASK|> b", until=[])], True)
    assert lm.generate_until([good], True) == ["The capital of France is Paris."]
    assert not lm.engine.busy


# Scores


def test_the_likeliest_continuation_is_the_right_one(lm):
    answers = [f"The capital of France is {city}." for city in ("Paris", "Rome", "Oslo")]
    requests = [Instance("loglikelihood", {}, (asked(lm, FRANCE), answer), 0) for answer in answers]
    scores = lm.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in scores] == [True, False, False]
    assert scores[0][0] > -0.01 and scores[0][0] > max(score for score, _ in scores[1:]) + 1
    whole = [lm.tok_encode(asked(lm, FRANCE) + answer) for answer in answers]
    context = len(lm.tok_encode(asked(lm, FRANCE)))
    assert scores == [Scorer(lm.model).score(ids[:context], ids[context:]) for ids in whole]


def test_a_continuation_of_nothing_is_scored_behind_an_end_token(lm):
    ids = lm.tok_encode("Tom has 3 apples.")
    (score,) = lm.loglikelihood([Instance("loglikelihood", {}, ("", "Tom has 3 apples."), 0)], disable_tqdm=True)
    assert score == Scorer(lm.model).score([lm.eot_token_id], ids)
    rolling = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("Tom has 3 apples.",), 0)], True)
    assert rolling == [score[0]]


def test_a_text_longer_than_the_window_is_scored_in_windows():
    lm, text = SimsdLM(pretrained="tiny-target", max_length=16), "Tom has 3 apples and 4 books and 5 cards and 6 coins."
    ids = lm.tok_encode(text)
    assert len(ids) > 16
    (rolling,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], True)
    first = [lm.eot_token_id], ids[:15]
    second = ids[len(ids) - 16 : 15], ids[15:]
    assert rolling == pytest.approx(sum(Scorer(lm.model).score(*window)[0] for window in (first, second)), abs=1e-4)


def test_a_chat_template_that_is_not_there_is_refused(pair):
    lm = SimsdLM(pretrained=pair[1])
    with pytest.raises(simsd.SimsdError, match="no chat template"):
        asked(lm, FRANCE)
    assert lm.generate_until([generation("hello", max_gen_toks=8, until=[])], True)[0] is not None
