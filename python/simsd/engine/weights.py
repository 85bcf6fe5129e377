"""New weights for a model that an engine runs, in place: what has been captured reads them where they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from simsd.errors import SimsdError
from simsd.models.loading import LoadedModel
from simsd.models.quantized import is_quantized

Weights = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


@torch.no_grad()
def replace_weights(model: LoadedModel, weights: Weights) -> None:
    """Copies tensors into parameters and buffers, by their names in the module's `state_dict`; those that are not named
    stay as they are. Tensors may be on any device and of any floating dtype. A mapping is checked as a whole before
    anything is changed, an iterator tensor by tensor.

    Raises:
        SimsdError: neither a mapping nor pairs, a name that the model does not have, or a shape that is not its own.
    """
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise SimsdError(f"weights must be a mapping or pairs of a name and a tensor, got {weights!r:.80}")
    own = model.model.state_dict(keep_vars=True)
    if isinstance(weights, Mapping):
        weights = weights.items()
        for name, value in weights:
            _check(model, own, name, value)
    for pair in weights:
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise SimsdError(f"weights must be pairs of a name and a tensor, got {type(pair).__name__} {pair!r:.80}")
        name, value = pair
        _check(model, own, name, value)
        own[name].copy_(value)


def _check(model: LoadedModel, own: Mapping[str, Tensor], name: str, value: Tensor) -> None:
    if name not in own:
        raise SimsdError(f"{model.name} has no weight {name!r:.120}: names are those of its state_dict()")
    if not isinstance(value, Tensor):
        raise SimsdError(f"weight {name} must be a tensor, got {type(value).__name__}")
    if is_quantized(own[name]):
        raise SimsdError(f"weight {name} of {model.name} is quantized, which stays: load the new weights as a model")
    if value.shape != own[name].shape:
        raise SimsdError(f"weight {name} of {model.name} is {list(own[name].shape)}, got {list(value.shape)}")
