"""The order head: from what the target drew in one state of a block to its log-odds in states that reveal more."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from simsd.config import MAX_BLOCK_LENGTH
from simsd.errors import NotFoundError, SimsdError, one_line
from simsd.models.loading import LoadedModel

VERSION = 1  # of the file
KEY = "simsd_order_head"  # of the metadata in the file
FACTS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")  # of a configuration, which a head is for
WIDTH, LAYERS, HEADS, FEATURES = 48, 2, 4, 8
LOWEST, HIGHEST = -20.0, 40.0  # log-odds, as read


class OrderHead(nn.Module):
    """How the log-odds of a block's masked positions change once more of them are revealed.

    From the statistics of one state that the target has seen it tells of every state that reveals more: there the
    log-odds of position i are log_odds[i] + shift[i] + the sum of pair[i, j] over the positions j that are revealed
    more, their sigmoid is the probability that the token drawn at i stays, and position i is revealed next with
    probability softmax(sharpness * log-odds). Untrained it changes nothing. It knows positions and statistics, no
    tokens: with as few prompts as it is trained on, tokens would be learned by heart.
    """

    def __init__(self, block_length: int) -> None:
        super().__init__()
        self.block_length = block_length
        self.read = nn.Linear(FEATURES, WIDTH)
        self.place = nn.Parameter(torch.zeros(block_length, WIDTH))
        self.layers = nn.ModuleList(_Layer(block_length) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.shift = nn.Linear(WIDTH, 2)
        self.changed, self.by = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.by_distance = nn.Parameter(torch.zeros(2 * block_length - 1))
        self.log_sharpness = nn.Parameter(torch.zeros(()))
        for zero in (*self.shift.parameters(), *self.by.parameters()):
            nn.init.zeros_(zero)
        at = torch.arange(block_length)
        self.register_buffer("distance", at[:, None] - at + block_length - 1, persistent=False)  # [L, L]

    @property
    def sharpness(self) -> Tensor:
        """float32, positive: how far the log-odds that it corrects tell the order, see `plan_block`."""
        return self.log_sharpness.exp()

    def forward(self, revealed: Tensor, prob: Tensor, log_odds: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            revealed: bool [..., L], of states that the target has seen.
            prob, log_odds, entropy: float32 [..., L], of what it drew there, as `simsd_kernels.sample_logits` gives
                them; read at masked positions. What is not finite there makes no result so.

        Returns:
            shift float32 [..., L] and pair float32 [..., L, L]: what revealing j (the last axis) adds to i. At revealed
            positions without meaning.
        """
        shape = revealed.shape
        prob, log_odds, entropy = (x.reshape(-1, self.block_length) for x in bounded(prob, log_odds, entropy))
        masked = ~revealed.reshape(-1, self.block_length)
        best = torch.where(masked, log_odds, LOWEST).amax(1, keepdim=True)
        told = (
            log_odds / 10,
            log_odds.tanh(),
            (log_odds - best) / 10,
            prob,
            entropy,
            masked.sum(1, True) / MAX_BLOCK_LENGTH,
        )
        features = torch.stack([x.expand_as(prob) for x in told], 2) * masked[..., None]
        x = self.read(torch.cat([features, torch.stack([masked, ~masked], 2).to(features)], 2)) + self.place
        for layer in self.layers:
            x = layer(x, self.distance)
        x = self.norm(x)
        scale, offset = self.shift(x).unbind(2)
        pair = self.changed(x) @ self.by(x).transpose(1, 2) / math.sqrt(WIDTH) + self.by_distance[self.distance]
        return (scale * log_odds + offset).view(shape), pair.view(*shape, self.block_length)


class _Layer(nn.Module):
    """Attention among the positions of a block, by what they are and how far apart, and a product of two layers."""

    def __init__(self, block_length: int) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.zeros(HEADS, 2 * block_length - 1))

    def forward(self, x: Tensor, distance: Tensor) -> Tensor:
        """x: [N, L, WIDTH]; distance: int64 [L, L]."""
        q, k, v = self.qkv(self.before(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # [N, HEADS, L, D] each
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, distance])
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.between(x))))


def bounded(prob: Tensor, log_odds: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics as the head reads them: finite, and within bounds."""
    return (
        prob.float().nan_to_num(nan=0.0).clamp(0, 1),
        log_odds.float().nan_to_num(nan=LOWEST).clamp(LOWEST, HIGHEST),
        entropy.float().nan_to_num(nan=0.0).clamp(0, 5),
    )


def facts_of(model: LoadedModel) -> dict[str, Any]:
    """What of a model a head for it keeps, to be refused for another."""
    return {name: getattr(model.config, name) for name in FACTS}


def save_order_head(head: OrderHead, file: Path, model: LoadedModel, training: dict[str, Any]) -> None:
    """Writes `order.safetensors`: the weights and, as metadata, what the head is for and what it was trained on. The
    file appears whole, or not at all.

    Args:
        training: plain values of the user's interest, which JSON can hold.
    """
    about = {"version": VERSION, "block_length": head.block_length, "model": {"name": model.name} | facts_of(model)}
    partial = file.with_name(file.name + ".partial")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    save_file(tensors, partial, metadata={KEY: json.dumps(about | {"training": training})})
    partial.chmod(0o644)
    partial.replace(file)


def load_order_head(file: str | Path, model: LoadedModel, block_length: int | None = None) -> OrderHead:
    """Reads what `save_order_head` wrote, onto the model's device.

    Args:
        block_length: that the model is decoded with; None: the model's own.

    Raises:
        NotFoundError: there is no such file.
        SimsdError: it holds no order head, a damaged one, or one for another model or block length.
    """
    file, length = Path(file), block_length or model.block_length
    about, tensors = _read(file)
    if about.get("version") != VERSION:
        raise SimsdError(f"{file} is an order head of version {about.get('version')!r}; this simsd reads {VERSION}")
    if about.get("block_length") != length:
        raise SimsdError(
            f"{file} is for blocks of {about.get('block_length')} tokens, {model.name} is decoded in blocks of"
            f" {length}: train one with simsd train-order --block-length {length}"
        )
    trained_on = about.get("model", {})
    differing = [
        f"{name} {trained_on.get(name)}, not {value}"
        for name, value in facts_of(model).items()
        if trained_on.get(name) != value
    ]
    if differing:
        raise SimsdError(
            f"{file} is for {trained_on.get('name', 'another model')} ({', '.join(differing)}): train one for"
            f" {model.name} with simsd train-order"
        )
    head = OrderHead(length)
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise SimsdError(f"{file} is damaged: {one_line(error)}") from error
    for name, tensor in head.state_dict().items():
        if not tensor.isfinite().all():
            raise SimsdError(f"{file} is damaged: its {name} holds values that are not finite; train it anew")
    return head.to(model.device).eval().requires_grad_(False)


def order_head_for(model: LoadedModel, choice: str, block_length: int) -> OrderHead | None:
    """The head for decoding in blocks of that length, see `EngineConfig.order_head`. Raises as `load_order_head`."""
    if choice == "none":
        return None
    if choice == "auto":
        file = None if model.folder is None else model.folder / f"order-{block_length}.safetensors"
        return load_order_head(file, model, block_length) if file is not None and file.exists() else None
    return load_order_head(choice, model, block_length)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not file.exists():
        raise NotFoundError(f"{file} is not there: simsd train-order writes one")
    if file.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise SimsdError(
            f"{file} is a pickle, as SPOT's published drafters are, which are not read: they need the 32 most probable"
            " tokens of each position, and layers that only their own code defines; train one with simsd train-order"
        )
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()} if KEY in metadata else {}
        about = json.loads(metadata.get(KEY, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise SimsdError(f"{file} is no order head: {one_line(error)}; simsd train-order writes one") from error
    if not isinstance(about, dict):
        raise SimsdError(f"{file} is no order head: its metadata has no {KEY}; simsd train-order writes one")
    return about, tensors
