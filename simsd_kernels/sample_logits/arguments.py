"""The settings of drawing that ops over slots share, by slot."""

from __future__ import annotations

import torch

from simsd_kernels.signature import Argument

FLOAT32_MAX = torch.finfo(torch.float32).max

TEMPERATURE = Argument(
    *("temperature", torch.float32, "B", "As in `sample_logits`."),
    low=0.0,
    high=FLOAT32_MAX,
    bounds="finite and >= 0",
)
# W = ceil(V / 32), for V ids of the logits.
OPTIONS = (
    Argument("top_k", torch.int32, "B", "", optional=True, low=0, bounds=">= 0 (0 is off)"),
    Argument("top_p", torch.float32, "B", "", optional=True, low=0.0, high=1.0, bounds="in [0, 1] (1 is off)"),
    Argument("seed", torch.int64, "B", "Needed where temperature > 0.", optional=True),
    Argument("banned", torch.int32, "W", "Of the ids that are never drawn, by `banned_mask`.", optional=True),
)
