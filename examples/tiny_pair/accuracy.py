"""Grades on held-out items of native greedy decoding: block by block, the most confident token first.

python examples/tiny_pair/accuracy.py long-target --pair long
"""

from typing import Annotated, Literal

import typer
from recipes import RECIPES, Recipe
from rich.console import Console

import simsd
from simsd.tasks import FAMILIES


def accuracies(model: simsd.LoadedModel, recipe: Recipe, block_length: int, count: int, seed: int = 0) -> dict:
    """Grade -> family -> mean grade of the model's answers to `count` held-out items."""
    config = simsd.GenerationConfig(
        verify="none", strategy="low_confidence_static", block_length=block_length, max_new_tokens=recipe.max_new_tokens
    )
    result: dict[str, dict[str, float]] = {name: {} for name in recipe.grades}
    for family in FAMILIES:
        items = recipe.items.held_out(family, count, seed)
        answers = simsd.generate(model, [item.prompt for item in items], config=config)
        for name, grade in recipe.grades.items():
            result[name][family] = sum(grade(i, a.text) for i, a in zip(items, answers, strict=True)) / count
    return result


def report(source: str, recipe: Recipe, count: int, console: Console) -> None:
    """A line per block length and grade."""
    model = simsd.load(source)
    for block_length in recipe.block_lengths:
        for grade, right in accuracies(model, recipe, block_length, count).items():
            figures = "  ".join(f"{family} {value:.3f}" for family, value in right.items())
            mean = sum(right.values()) / len(right)
            text = f"blocks of {block_length}, {grade} ({count} prompts each): {figures}  average {mean:.3f}"
            console.print(text, soft_wrap=True, highlight=False)


def main(
    model: Annotated[str, typer.Argument(help="Built-in name or exported folder.")],
    pair: Annotated[Literal["tiny", "long"], typer.Option(help="Whose items it answers.")] = "tiny",
    count: Annotated[int, typer.Option(min=1, help="Held-out items per family.")] = 200,
) -> None:
    try:
        report(model, RECIPES[pair], count, Console())
    except simsd.SimsdError as error:
        raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    typer.run(main)
