"""What `plan_block` takes and gives."""

from __future__ import annotations

import dataclasses

import torch

from simsd_kernels.reveal.arguments import MAX_LENGTH, RULE
from simsd_kernels.rows import INF
from simsd_kernels.sample_logits.arguments import FLOAT32_MAX, OPTIONS, TEMPERATURE
from simsd_kernels.signature import FLOATING, Argument, Number, Result, Signature

_ROWS = "B (pending+K+max_states)*L"

SIGNATURE = Signature(
    "plan_block",
    (
        Argument("text", torch.int64, "B T", "Committed tokens; behind them the current block, read where revealed."),
        Argument("revealed", torch.int64, "B", "Set of revealed positions of the current block."),
        Argument(
            *("start", torch.int32, "B"),
            "Position of the current block, a multiple of L; negative: the slot is idle, all its rows are dead.",
            high="min(T, scratch) - L",
        ),
        Argument("end", torch.int32, "B", "Where the last block ends that the walk may enter.", high="scratch"),
        Argument("step", torch.int32, "B", "Denoising steps that the current block has had."),
        Argument(
            *("kv_len", torch.int32, "B"),
            "Tokens whose keys and values are in place; those from there to `start`, at most pending * L, come along.",
        ),
        Argument(
            *("draft_tokens", torch.int64, "B K L"),
            "The current and following blocks as the draft finishes them; L <= 64.",
            least=(("L", 1),),
        ),
        Argument(*("proposal_depth", torch.int32, "B"), "Blocks proposed; those behind the K-th do not count.", low=0),
        Argument("draft_end", torch.int32, "B", "Blocks after which the draft ended the text: none behind is entered."),
        Argument("prob", torch.float32, "B K L", "The draft's probabilities of draft_tokens (see `sample_logits`) ..."),
        Argument("log_odds", torch.float32, "B K L", "... their log-odds ..."),
        Argument("entropy", torch.float32, "B K L", "... and the entropies in nats."),
        Argument(
            *("draft_calibration", torch.float32, "B", "How far the draft's probabilities are believed."),
            low=0.0,
            high=1.0,
        ),
        Argument(
            *("order_sharpness", torch.float32, "B K"),
            "How far its statistics of a block are believed to tell the order.",
            low=0.0,
            high=FLOAT32_MAX,
            bounds="finite and >= 0",
        ),
        Argument(
            *("min_visit_prob", torch.float32, "B"),
            "States are taken while one is visited with at least this probability per L rows that it costs.",
            low=0.0,
        ),
        Argument("row_budget", torch.int32, "1", "Rows that states may add over the batch, current ones aside.", low=0),
        *RULE,
        Argument(
            *("draft_logits", FLOATING, "B K L V"),
            "Given, the tokens and statistics of each state are drawn from them, with the noise of that state (needed"
            " at temperature > 0, where the target will judge with that noise); draft_tokens then only says which"
            " finished blocks come along. `reference` also takes float64.",
            optional=True,
            least=(("V", 1),),
        ),
        dataclasses.replace(TEMPERATURE, about="As in `sample_logits`, for draft_logits.", optional=True),
        *OPTIONS[:-1],
        dataclasses.replace(OPTIONS[-1], high=None),
        Argument(
            *("peeks", torch.int32, "B"),
            "1: the next block's empty state comes along, too, behind the current block as drafted, however probable.",
            optional=True,
        ),
        Argument(
            *("seen_block", torch.int32, "B M"),
            "States that the target has seen: their blocks, counted from the current one. What it drew in the one"
            " nearest to a state is the proposal there, the draft's where there is none.",
            optional=True,
        ),
        Argument(
            *("seen_exact", torch.int32, "B M"),
            "1: it would draw the same there now; 0: the text before the block may have been another.",
            optional=True,
        ),
        Argument(
            *("seen_revealed", torch.int64, "B M"),
            "Their sets of revealed positions (all of L: no state).",
            optional=True,
        ),
        Argument(
            *("seen_tokens", torch.int64, "B M L"),
            "Their tokens where revealed, elsewhere what it drew (where all states share draws) ...",
            optional=True,
        ),
        Argument("seen_prob", torch.float32, "B M L", "... with these probabilities ...", optional=True),
        Argument("seen_log_odds", torch.float32, "B M L", "... log-odds ...", optional=True),
        Argument("seen_entropy", torch.float32, "B M L", "... and entropies.", optional=True),
        Argument(
            *("seen_sharpness", torch.float32, "B", "As order_sharpness, for these."),
            low=0.0,
            high=FLOAT32_MAX,
            bounds="finite and >= 0",
            optional=True,
        ),
        Argument(
            *("seen_rows", torch.int32, "B M L"),
            "With draft_logits: the rows of seen_logits of their masked positions, in [0, R), from which each state"
            " draws where it has noise of its own.",
            optional=True,
        ),
        Argument(
            *("seen_logits", FLOATING, "R V"),
            "With draft_logits, and of their dtype: what the target's last forward gave.",
            optional=True,
            least=(("R", 1),),
        ),
        Argument(
            *("order_shift", torch.float32, "B M L"),
            "What a state that reveals more than the one seen adds to the log-odds there ...",
            optional=True,
        ),
        Argument(
            *("order_pair", torch.float32, "B M L L"),
            "... and what each of the positions that it reveals more (the last axis) adds to each other.",
            optional=True,
        ),
    ),
    numbers=(
        Number("mask_id", "What stands in masked positions."),
        Number("pending", "P, blocks of clean tokens that may come along."),
        Number("max_states", "C, the current state included.", low=1, high="stride-3"),
        Number("logits_rows", "N, rows whose logits can be asked for.", low="B*L", high=2**31 - 1),
        Number(
            "scratch",
            "First KV slot for states, `copy_stride(L)` slots each; behind every position that the walk may enter.",
        ),
        Number("kv_slots", "S, of a sequence's cache.", low="scratch", high=2**31 - 1),
        Number(
            *("stride", "Clock ticks per block; clocks of the blocks before scratch stay below 2**30."),
            low=4,
            high=f"{INF - 1} // max(scratch // L, 1)",
        ),
    ),
    results=(
        Result("tokens", torch.int64, _ROWS),
        Result("positions", torch.int32, _ROWS),
        Result("slots", torch.int32, _ROWS),
        Result("clock", torch.int32, _ROWS),
        Result("birth", torch.int32, "B kv_slots"),
        Result("death", torch.int32, "B kv_slots"),
        Result("states", torch.int64, "B max_states L"),
        Result("state_revealed", torch.int64, "B max_states"),
        Result("block", torch.int32, "B max_states"),
        Result("draft_blocks_in_rows", torch.int32, "B"),
        Result("logits_index", torch.int64, "logits_rows"),
        Result("state_rows", torch.int32, "B max_states L"),
    ),
    most=(("L", MAX_LENGTH),),
)
