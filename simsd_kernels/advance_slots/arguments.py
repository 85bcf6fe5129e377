"""What `advance_slots` takes: nearly all that a slot holds, and what the walk gave."""

from __future__ import annotations

import torch

from simsd_kernels.reveal.arguments import MAX_LENGTH
from simsd_kernels.signature import Argument, Signature
from simsd_kernels.verify_graph.arguments import PROGRESS

NO_END = 2**30  # `draft_end` of a draft that did not end the text
HEAD = 16  # numbers in a row of the report before its blocks
COLUMNS = 5  # numbers for each position of these


def _state(name: str, dtype: torch.dtype, shape: str, about: str = "", **bounds) -> Argument:
    return Argument(name, dtype, shape, about, written=True, **bounds)


SIGNATURE = Signature(
    "advance_slots",
    (
        _state("text", torch.int64, "B T", "Committed tokens, then those of the current block where revealed."),
        _state("start", torch.int32, "B", "Position of the current block; negative: the slot is idle.", high="T-L"),
        _state("revealed", torch.int64, "B", "Set of revealed positions of the current block."),
        _state("step", torch.int32, "B", "Steps that it has had."),
        _state("step_map", torch.int32, "B L", "Of the current block, as in `verify_graph`; L <= 64."),
        _state("prob", torch.float32, "B L", "The same."),
        _state("draw_logprob", torch.float32, "B L", "The same."),
        _state("origin", torch.int32, "B L", "The same."),
        _state("target_kv_len", torch.int32, "B", "Tokens whose keys and values the target's cache has."),
        _state("draft_kv_len", torch.int32, "B", "The same of the draft's cache."),
        _state("last_rows", torch.int32, "B L", "Logits row that the target has given for a masked position, or -1."),
        _state("draft_tokens", torch.int64, "B K L", "The proposal: blocks as the draft finishes them ..."),
        _state("draft_prob", torch.float32, "B K L", "... with the draft's statistics ..."),
        _state("draft_log_odds", torch.float32, "B K L", "... of them."),
        _state("draft_entropy", torch.float32, "B K L", "In nats."),
        _state("order_sharpness", torch.float32, "B K", "As in `plan_block`."),
        _state("proposal_depth", torch.int32, "B", "Blocks proposed; those behind the K-th do not count.", low=0),
        _state("draft_end", torch.int32, "B", "Blocks after which the draft ended the text; 2**30: it did not."),
        _state("report", torch.int32, f"B {HEAD}+{COLUMNS}*(K+2)*L", "One row for the host, see below."),
        Argument("end", torch.int32, "B", "Position behind the text."),
        Argument("prompt_len", torch.int32, "B", "Tokens of the prompt, where stop ids do not count."),
        Argument("request_epoch", torch.int32, "B", "Tells the slot's requests apart."),
        Argument("stop_ids", torch.int64, "B E", "Tokens that end the text; negative: none."),
        Argument("walk_progress", torch.int32, f"B {PROGRESS}", "What `verify_graph` returned."),
        Argument("walk_revealed", torch.int64, "B", "The same, and so on."),
        Argument("walk_tokens", torch.int64, "B K+2 L"),
        Argument("walk_step_map", torch.int32, "B K+2 L"),
        Argument("walk_prob", torch.float32, "B K+2 L"),
        Argument("walk_draw_logprob", torch.float32, "B K+2 L"),
        Argument("walk_origin", torch.int32, "B K+2 L"),
        Argument("state_rows", torch.int32, "B C L", "What `plan_block` returned."),
        Argument("block", torch.int32, "B C", "The same."),
        Argument("draft_blocks_in_rows", torch.int32, "B", "The same."),
    ),
    most=(("L", MAX_LENGTH),),
)
