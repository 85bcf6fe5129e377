"""Exact match on held-out items by native greedy decoding: block by block, the most confident token first."""

from pathlib import Path

from recipes import Recipe

import simsd
from simsd.tasks import FAMILIES


def accuracies(folder: Path, recipe: Recipe, block_length: int, count: int, seed: int = 0) -> dict[str, float]:
    """The fraction of `count` held-out items of each family that the exported model answers right."""
    model = simsd.load(folder)
    config = simsd.GenerationConfig(
        verify="none", strategy="low_confidence_static", block_length=block_length, max_new_tokens=recipe.max_new_tokens
    )
    result = {}
    for family in FAMILIES:
        items = recipe.items.held_out(family, count, seed)
        answers = simsd.generate(model, [item.prompt for item in items], config=config)
        result[family] = sum(recipe.items.is_correct(i, a.text) for i, a in zip(items, answers, strict=True)) / count
    return result
