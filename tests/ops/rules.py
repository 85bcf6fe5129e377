"""How the blocks of slots are denoised, as the arguments that control ops take."""

import torch

from arguments import signed

STRATEGIES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")


def rule(length, *slots):
    """schedule, steps, strategy, threshold and sub_blocks of slots, each given as (schedule, strategy, threshold) or as
    (schedule, strategy, threshold, positions at which a sub-block begins)."""
    schedules = [list(schedule) for schedule, *_ in slots]
    begins = [sum(1 << i for i in set(rest[0])) if rest else 0 for _, _, _, *rest in slots]
    unread = [[7] * (length - len(schedule)) for schedule in schedules]  # a wrong number, should it be read
    return {
        "schedule": torch.tensor(
            [known + rest for known, rest in zip(schedules, unread, strict=True)], dtype=torch.int32
        ).view(len(slots), length),
        "steps": torch.tensor([len(schedule) for schedule in schedules], dtype=torch.int32),
        "strategy": torch.tensor([STRATEGIES.index(strategy) for _, strategy, *_ in slots], dtype=torch.int32),
        "threshold": torch.tensor([threshold for _, _, threshold, *_ in slots], dtype=torch.float32),
        "sub_blocks": torch.tensor([signed(bits) for bits in begins], dtype=torch.int64),
    }


def even(length, steps):
    """Positions to reveal at each of `steps` steps."""
    return [length // steps + (step < length % steps) for step in range(steps)]
