"""What `reveal` takes and gives, and the settings that it shares with the ops that take steps as it does."""

from __future__ import annotations

import math

import torch

from simsd_kernels.signature import Argument, Result, Signature

STRATEGIES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")
MAX_LENGTH = 64  # the revealed set is one int64 bitmask

# How the block of each slot is denoised.
RULE = (
    Argument("schedule", torch.int32, "B L", "Positions to reveal at each step; unread from `steps` on.", low=0),
    Argument("steps", torch.int32, "B", "Denoising steps of a block, T; 0: none is taken.", low=0, high="L"),
    Argument("strategy", torch.int32, "B", "Index into `STRATEGIES`.", low=0, high=len(STRATEGIES) - 1),
    Argument(
        *("threshold", torch.float32, "B", "A probability (dynamic), or a sum of entropies in nats (bounded)."),
        low=-math.inf,
        bounds="a number",
    ),
    Argument(
        *("sub_blocks", torch.int64, "B"),
        "Bit i is set where a sub-block begins: a step reveals positions of the leftmost one that has any masked, but"
        " for the last step, which reveals all. None or 0: the block is one.",
        optional=True,
    ),
)

SIGNATURE = Signature(
    "reveal",
    (
        Argument("tokens", torch.int64, "B L", "L <= 64. Newly revealed positions get their proposal.", written=True),
        Argument("revealed", torch.int64, "B", "Bit i is set where position i is revealed.", written=True),
        Argument(
            *("step_map", torch.int32, "B L"),
            "Newly revealed positions get step + 1 (0 stays for those known from the start).",
            written=True,
        ),
        Argument("proposal", torch.int64, "B L", "What each position would become."),
        Argument("prob", torch.float32, "B L", "The proposals' probabilities (see `sample_logits`) ..."),
        Argument("log_odds", torch.float32, "B L", "... and log-odds."),
        Argument("entropy", torch.float32, "B L", "In nats."),
        Argument("step", torch.int32, "B", "A slot whose step is outside [0, steps) is left alone."),
        *RULE,
    ),
    results=(Result("newly", torch.int64, "B"),),
    most=(("L", MAX_LENGTH),),
)
