"""What `verify_graph` takes and gives."""

from __future__ import annotations

import torch

from simsd_kernels.reveal.arguments import MAX_LENGTH, RULE
from simsd_kernels.sample_logits.arguments import OPTIONS, TEMPERATURE
from simsd_kernels.signature import FLOATING, Argument, Result, Signature

PROGRESS = 7  # numbers in `Walk.progress`

SIGNATURE = Signature(
    "verify_graph",
    (
        Argument("target_logits", FLOATING, "N V", "`reference` also takes float64.", least=(("V", 1),)),
        Argument(
            *("rows", torch.int32, "B C L"),
            "Row of target_logits for each position of each state; read at masked positions of states that the walk"
            " visits. No row serves two of them. State 0 is the current one.",
        ),
        Argument("states", torch.int64, "B C L", "Tokens, read where revealed; L <= 64."),
        Argument("state_revealed", torch.int64, "B C", "Sets of revealed positions."),
        Argument(
            *("block", torch.int32, "B C", "The block that a state is of, from the current one on; -1: no state."),
            low=-1,
            high="K",
        ),
        Argument("draft_tokens", torch.int64, "B K L", "The blocks as the draft finishes them."),
        Argument("draft_blocks_in_rows", torch.int32, "B", "Of these, rows of the forward.", low=0, high="K"),
        Argument("proposal_depth", torch.int32, "B", "Of these, proposed; those behind the K-th do not count.", low=0),
        Argument("start", torch.int32, "B", "Position of the current block."),
        Argument("step", torch.int32, "B", "Steps that it has had; outside [0, steps): the slot does not walk."),
        Argument("step_map", torch.int32, "B L", "Of the current block so far: the step that revealed a position ..."),
        Argument("prob", torch.float32, "B L", "... with which probability ..."),
        Argument("draw_logprob", torch.float32, "B L", "... (and which log-probability of the draw) ..."),
        Argument("origin", torch.int32, "B L", "... and how (see `Walk`)."),
        TEMPERATURE,
        *RULE,
        *OPTIONS,
    ),
    results=(
        Result("progress", torch.int32, f"B {PROGRESS}"),
        Result("revealed", torch.int64, "B"),
        Result("tokens", torch.int64, "B K+2 L"),
        Result("step_map", torch.int32, "B K+2 L"),
        Result("prob", torch.float32, "B K+2 L"),
        Result("draw_logprob", torch.float32, "B K+2 L"),
        Result("origin", torch.int32, "B K+2 L"),
    ),
    most=(("L", MAX_LENGTH),),
)
