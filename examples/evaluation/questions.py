"""The built-in pair's held-out questions: files of them, and how lm-eval reads such a file.

`python examples/evaluation/questions.py` writes arithmetic.jsonl, facts.jsonl and choice.jsonl anew.
"""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
COUNT = 100  # questions per file


def load(file: str, **_: object) -> dict[str, object]:
    """The questions of a file in this folder, for `custom_dataset` of a task; lm-eval adds arguments of its own."""
    from datasets import Dataset

    lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def write() -> None:
    from simsd import tasks

    for family in ("arithmetic", "facts", "choice"):
        lines = [json.dumps(_fields(task)) for task in tasks.held_out(family, COUNT)]
        (FOLDER / f"{family}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _fields(task) -> dict[str, object]:
    fields = {"question": task.prompt, "answer": task.answer}
    if task.family == "choice":  # every letter's response, of which one is right
        options = dict(re.findall(r"([ABCD]): (.+?)(?= [ABCD]:|$)", task.prompt))
        statement = task.response.partition(f"{options[task.answer]}. ANSWER")[0]
        fields["responses"] = [f"{statement}{option}. ANSWER: {letter}" for letter, option in options.items()]
    return fields


if __name__ == "__main__":
    write()
