"""Programs of simsd_mbpp: its shots, what of a text is the program, and whether it passes."""

import re


def shots(docs):
    """Problems 2, 3 and 4, which MBPP's authors prompt with."""
    return [doc for doc in docs if doc["task_id"] in (2, 3, 4)]


def extract(responses: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """Of each text what stands in a Markdown fence, if there is one, without quotes around it."""
    return [[_program(text) for text in texts] for texts in responses]


def _program(text: str) -> str:
    fenced = re.search(r"```(?:python)?\n(.*?)(?:```|$)", text, re.DOTALL)
    return (fenced[1] if fenced else text.removeprefix("[BEGIN]")).strip().strip("'")


def pass_at_1(references: list[str], predictions: list[list[str]]) -> float:
    """Runs the program with its tests (the `evaluate` library's code_eval, which asks for HF_ALLOW_CODE_EVAL=1)."""
    import evaluate

    programs = [program if isinstance(program, list) else [program] for program in predictions]
    scores, _ = evaluate.load("code_eval").compute(references=references, predictions=programs, k=[1])
    return scores["pass@1"]
