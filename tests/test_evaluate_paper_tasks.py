"""The paper's tasks: read, prompted and graded by lm-eval on a few rows with the columns of the real data."""

from __future__ import annotations

from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval", reason='needs pip install "simsd-kernels[evaluate]"')

import datasets  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

FOLDER = Path(__file__).parents[1] / "examples" / "evaluation" / "paper"

GSM8K = [
    {"question": f"What is {n} + {n}?", "answer": f"It is {n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n:,}"}
    for n in (1, 2, 3, 4, 900)
]
MBPP = [
    {
        "task_id": n,
        "text": f"Write a function f{n}.",
        "code": f"def f{n}(): return {n}",
        "test_list": [f"assert f{n}() == {n}"],
    }
    for n in range(1, 12)
]
TRIVIA = [{"question": "Who wrote Hamlet", "answer": {"aliases": ["William Shakespeare", "The Bard", "Shakespeare"]}}]
MMLU = [
    {
        "question": "Which is a metal?",
        "choices": ["iron", "neon", "argon", "xenon"],
        "answer": 0,
        "subject": "chemistry",
    }
]
ROWS = {
    "openai/gsm8k": {"train": GSM8K[:4], "test": GSM8K[4:]},
    "google-research-datasets/mbpp": {"prompt": MBPP[:10], "test": MBPP[10:]},
    "mandarjoshi/trivia_qa": {"validation": TRIVIA},
    "cais/mmlu": {"test": MMLU},
}


class Parrot(LM):
    """Says one thing, and keeps what it was asked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.asked = text, []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += [request.args for request in requests]
        return [self.text] * len(requests)

    loglikelihood = loglikelihood_rolling = None


@pytest.fixture
def answered(monkeypatch):
    """answered(task, text) -> (its metrics when the model says that, the prompt, the generation settings)"""
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, name=None, **_: datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split, rows in ROWS[path].items()}
        ),
    )

    def answered_(task: str, text: str) -> tuple[dict, str, dict]:
        parrot, manager = Parrot(text), TaskManager(include_path=str(FOLDER), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=parrot, tasks=[task], task_manager=manager, bootstrap_iters=0, confirm_run_unsafe_code=True
        )
        ((prompt, settings),) = parrot.asked
        return found["results"][task], prompt, settings

    return answered_


@pytest.mark.parametrize(
    ("text", "right"),
    [("900+900=1800.\nThe answer is 1800", 1), ("The answer is 1,800.", 1), ("1800, no: 1801", 0), ("none", 0)],
)
def test_gsm8k(answered, text, right):
    metrics, prompt, settings = answered("simsd_gsm8k", text)
    assert metrics["exact_match,last_number"] == right
    assert prompt.count("Let's think step by step\nAnswer:") == 5 and "<<" not in prompt
    assert "It is 4+4=8.\nThe answer is 8" in prompt and prompt.endswith("Answer:")
    assert (settings["max_gen_toks"], settings["until"], settings["do_sample"]) == (512, ["Question:"], False)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Yes, the answer is the Bard", 1),
        (" The answer is william shakespeare.", 1),
        ("Shakespeare", 1),
        ("The answer is Marlowe.", 0),
    ],
)
def test_triviaqa(answered, text, right):
    metrics, prompt, settings = answered("simsd_triviaqa", text)
    assert metrics["exact_match,answer"] == right
    assert prompt.endswith("Q: Who wrote Hamlet?\nA:") and settings["max_gen_toks"] == 50


@pytest.mark.parametrize(("text", "right"), [("Iron is.\nANSWER: A", 1), ("ANSWER: B, no, answer: a", 1), ("A", 0)])
def test_mmlu(answered, text, right):
    metrics, prompt, settings = answered("simsd_mmlu", text)
    assert metrics["exact_match,letter"] == right
    assert prompt.endswith("A) iron\nB) neon\nC) argon\nD) xenon") and settings["max_gen_toks"] == 512


def test_mbpp(answered, monkeypatch):
    class CodeEval:
        """What `evaluate` loads from the hub: here the program is run at once."""

        def compute(self, references, predictions, k):
            ((program,),), (tests,) = predictions, references
            space: dict = {}
            exec(program, space)
            exec(tests, space)
            return {"pass@1": 1.0}, {}

    import evaluate

    monkeypatch.setattr(evaluate, "load", lambda name: CodeEval())
    for text in (
        "def f11(): return 11\n",
        "'def f11(): return 11'",
        "Sure:\n```python\ndef f11(): return 11\n```\nDone.",
    ):
        metrics, prompt, settings = answered("simsd_mbpp", text)
        assert metrics["pass_at_1,program"] == 1.0
    assert [n for n in range(1, 12) if f"Write a function f{n}." in prompt] == [2, 3, 4, 11]
    assert "[BEGIN]\ndef f3(): return 3\n[DONE]" in prompt and prompt.endswith("[BEGIN]\n")
    assert (settings["max_gen_toks"], settings["until"]) == (512, ["[DONE]"])
