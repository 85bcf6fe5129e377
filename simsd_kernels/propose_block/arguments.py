"""What `propose_block` takes."""

from __future__ import annotations

import torch

from simsd_kernels.reveal.arguments import MAX_LENGTH, RULE
from simsd_kernels.sample_logits.arguments import OPTIONS, TEMPERATURE
from simsd_kernels.signature import FLOATING, Argument, Number, Signature

SIGNATURE = Signature(
    "propose_block",
    (
        Argument("logits", FLOATING, "N V", "The draft's. `reference` also takes float64.", least=(("V", 1),)),
        Argument(
            *("rows", torch.int32, "B L"),
            "Row of logits for each position; revealed ones need none. A slot whose rows are all negative takes no"
            " part. L <= 64.",
            high="N-1",
        ),
        Argument("text", torch.int64, "B T", "Read where revealed; masked positions get what is drawn.", written=True),
        Argument("start", torch.int32, "B", "Position of the slot's current block."),
        Argument("revealed", torch.int64, "B", "Of block number `block`: set of revealed positions ..."),
        Argument("step", torch.int32, "B", "... and steps that it has had."),
        Argument("draft_tokens", torch.int64, "B K L", "Block number `block` as it is finished.", written=True),
        Argument("prob", torch.float32, "B K L", "Statistics of the first draw, at masked positions ...", written=True),
        Argument("log_odds", torch.float32, "B K L", "... as `sample_logits` gives them.", written=True),
        Argument("entropy", torch.float32, "B K L", "In nats.", written=True),
        Argument("proposal_depth", torch.int32, "B", "Becomes block + 1.", written=True),
        Argument("draft_end", torch.int32, "B", "Becomes block + 1 if the block has a stop id.", written=True),
        Argument("prompt_len", torch.int32, "B", "Tokens of the prompt, where stop ids do not count."),
        Argument("stop_ids", torch.int64, "B E", "Tokens that end the text; negative: none."),
        TEMPERATURE,
        *RULE,
        *OPTIONS,
    ),
    numbers=(
        Number("block", "Which one, counted from the current block on.", high="K-1"),
        Number("noise", "0 promises that every temperature is 0.", high=1),
    ),
    most=(("L", MAX_LENGTH),),
)
