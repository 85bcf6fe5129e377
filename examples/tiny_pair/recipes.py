"""What the pairs are trained on."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from simsd import questionnaires, tasks


@dataclass(frozen=True)
class Recipe:
    """
    Attributes:
        items: has `training_item` and `held_out`.
        grades: what an answer is worth, 0 to 1, by (item, text); by the name of the figure.
        block_lengths: each step draws one of these; the first is the exported model's.
        mixture: share of each family among the items.
        max_new_tokens: that an answer may have.
    """

    items: ModuleType
    grades: dict[str, Callable[..., float]]
    block_lengths: tuple[int, ...]
    mixture: dict[str, float]
    items_per_step: int
    max_new_tokens: int


RECIPES = {
    "tiny": Recipe(
        items=tasks,
        grades={"answers": tasks.is_correct},
        block_lengths=(4,),
        mixture={"arithmetic": 0.34, "code": 0.28, "facts": 0.08, "choice": 0.30},
        items_per_step=64,
        max_new_tokens=40,
    ),
    "long": Recipe(
        items=questionnaires,
        grades={"questions": questionnaires.score, "whole prompts": questionnaires.is_correct},
        block_lengths=(16, 8, 32),
        mixture={"arithmetic": 0.25, "code": 0.40, "facts": 0.05, "choice": 0.30},
        items_per_step=24,
        max_new_tokens=128,
    ),
}
