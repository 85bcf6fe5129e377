"""lm-eval's scores of the built-in pair on the local tasks, native beside exact: the table of docs/evaluation.md.

`python examples/evaluation/compare.py` takes about half a minute.
"""

import dataclasses
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

import simsd.evaluate.harness  # noqa: F401, registers the model

TASKS = {  # their metrics
    "tiny_arithmetic": "exact_match,number",
    "tiny_facts": "exact_match,last_word",
    "tiny_choice": "acc,none",
}
TEMPERATURES = (0.0, 2.0)  # at the second not all answers are right


@dataclasses.dataclass(frozen=True)
class Scored:
    accuracy: dict[str, float]
    answers: dict[str, list]  # texts, or scores
    forwards: int


def score(verify: str, temperature: float) -> Scored:
    found = lm_eval.simple_evaluate(
        model="simsd",
        model_args={"pretrained": "tiny-target", "draft": "tiny-draft", "verify": verify, "device": "cpu"},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(Path(__file__).parent), include_defaults=False),
        batch_size=8,
        apply_chat_template=True,
        gen_kwargs={"do_sample": True, "temperature": temperature} if temperature else None,
        bootstrap_iters=0,
    )
    metrics, generation = found["results"], found["config"]["generation"]
    return Scored(
        {task: metrics[task][metric] for task, metric in TASKS.items()},
        {task: [sample["resps"] for sample in found["samples"][task]] for task in TASKS},
        generation["target_forwards"],
    )


def main() -> None:
    print("| | native | exact | answers that differ |\n|---|---:|---:|---:|")
    for temperature in TEMPERATURES:
        how = f"temperature {temperature:g}" if temperature else "greedy"
        native, exact = (score(verify, temperature) for verify in ("none", "exact"))
        for task in TASKS:
            if task == "tiny_choice" and temperature:
                continue  # scores know no temperature
            differ = sum(a != b for a, b in zip(native.answers[task], exact.answers[task], strict=True))
            of = "scored, not generated" if task == "tiny_choice" else how
            print(f"| {task}, {of} | {native.accuracy[task]:.0%} | {exact.accuracy[task]:.0%} | {differ} |")
        print(f"| target forwards, {how} | {native.forwards} | {exact.forwards} | |")


if __name__ == "__main__":
    main()
