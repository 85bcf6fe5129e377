"""Modules whose forwards compute rows that do not depend on how many rows there are: `simsd.load(...,
deterministic=True)`, on the CPU the default in float32. The fused layers, which decode, need none of this.

Four operations of a stock forward do depend on it (`python -m benchmarks batch_invariance` measures the first three):

- linear layers, the router's and the experts' included: a BLAS picks its kernel by the number of rows;
- the experts' grouped product: the same, by the number of rows that each expert was chosen for;
- SiLU on the CPU: torch takes one exp for elements that fill whole vectors and another for those left over at the end,
  and which ones those are depends on the rows before them;
- RMSNorm on CUDA: torch's mean shares a row out to more threads the fewer rows there are.

`simsd.load(..., thin_linear=True)` replaces nothing but linear layers that are modules of their own (`nn.Linear`).

The modules that compute these change their class, not their contents: names, weights and state dict stay as they were.
They are those that the model's device needs: move it by `simsd.load(model, device=...)`. A mixture of experts loops
over its experts, for which on CUDA the host waits in every layer.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts, Glm4MoeRMSNorm, Glm4MoeTopkRouter
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeRMSNorm, Qwen3MoeTopKRouter

from simsd.errors import SimsdError
from simsd.models.attention import unchecked
from simsd.models.quantized import is_quantized, operands, stored
from simsd_kernels import dispatch, thin_linear


def check_supported(config: PreTrainedConfig, device: torch.device) -> None:
    """Raises SimsdError unless a model like this can be made deterministic."""
    if device.type not in _BY_DEVICE:
        raise SimsdError(f"deterministic=True is for models on the CPU or on CUDA, got device {device}")
    if config.hidden_act != "silu":
        raise SimsdError(f"deterministic=True knows the activation silu, got hidden_act={config.hidden_act!r}")


def preferable(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether the modules of a model like this are no slower when they are deterministic, as far as was measured."""
    if device.type != "cpu" or dtype not in (None, torch.float32) or config.hidden_act != "silu":
        return False
    if dispatch.compiled_obstacle("thin_linear", "CPU") is not None:
        return False
    return torch.ops.simsd._cpu_capability() != "portable"


def affordable(device: torch.device) -> bool:
    """Whether thin_linear is more than its definition here, which no model of any size can wait for."""
    if dispatch.compiled_obstacle("thin_linear", "CPU" if device.type == "cpu" else "CUDA") is None:
        return True
    return device.type == "cuda" and dispatch.triton_obstacle() is None


def make_deterministic(model: PreTrainedModel) -> None:
    """Makes every row of the model's forwards independent of all other rows, bit for bit, in place."""
    check_supported(model.config, model.device)
    model.config._experts_implementation = "eager"  # a loop over experts: their linear layers are ordinary ones
    _change_classes(model, _EVERYWHERE | _BY_DEVICE[model.device.type])


def use_thin_linear(model: PreTrainedModel) -> None:
    """Makes thin_linear of the model's linear layers, in place, and leaves everything else as it is."""
    _change_classes(model, {nn.Linear: _Linear})


def read_quantized_experts(model: PreTrainedModel) -> None:
    """Makes thin_linear of the products of experts that are quantized with row scales, in place."""
    model.config._experts_implementation = "eager"
    _change_classes(model, {kind: _EVERYWHERE[kind] for kind in (Qwen3MoeExperts, Glm4MoeExperts)})


def is_deterministic(model: nn.Module) -> bool:
    """Whether `make_deterministic` has been here."""
    return any(isinstance(module, _DeterministicLinear) for module in model.modules())


def uses_thin_linear(model: nn.Module) -> bool:
    """Whether `make_deterministic` or `use_thin_linear` has been here."""
    return any(isinstance(module, _Linear) for module in model.modules())


def stock_class(module: nn.Module) -> type:
    """The module's class as it was before `make_deterministic` or `use_thin_linear`."""
    kind = type(module)
    while kind.__module__ == __name__:
        kind = kind.__base__
    return kind


def _change_classes(model: nn.Module, classes: dict[type, type]) -> None:
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` by thin_linear."""
    out = unchecked(thin_linear, x.device, x.dtype)(x, *operands(*stored(weight)))
    return out if bias is None else out + bias


class _ThinLinear(TorchFunctionMode):
    """While it is entered, `torch.nn.functional.linear` is thin_linear."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = linear if function is nn.functional.linear else function
        return function(*args, **(kwargs or {}))


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _DeterministicLinear(_Linear):
    """The same; says that the rest of the model is deterministic, too."""


class _SiLU(SiLUActivation):
    def forward(self, x: Tensor) -> Tensor:
        # torch has one vectorised exp, which also takes what is left over; the rest is exact arithmetic.
        wide = x.float()
        return (wide / (1 + torch.exp(-wide))).to(x.dtype)


def _normalised(self, hidden_states: Tensor) -> Tensor:
    """RMSNorm, its sum of squares a product with a row of ones."""
    wide = hidden_states.float()
    squares = linear(wide.square(), torch.ones_like(self.weight, dtype=torch.float32)[None])  # [..., 1]
    scale = torch.rsqrt(squares / hidden_states.shape[-1] + self.variance_epsilon)
    return self.weight * (wide * scale).to(hidden_states.dtype)


def _by_thin_linear(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with the linear layers of its forward by thin_linear."""

    def forward(self, *args, **kwargs):
        with contextlib.ExitStack() as stack:
            stack.enter_context(_ThinLinear())
            if torch.is_inference_mode_enabled() and any(map(is_quantized, self._parameters.values())):
                # There, one expert of torchao's tensor could not be had.
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            return kind.forward(self, *args, **kwargs)

    return type(f"_{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


def _norm(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"_{kind.__name__}", (kind,), {"forward": _normalised, "__module__": __name__})


_ROUTED = (Qwen3MoeTopKRouter, Qwen3MoeExperts, Glm4MoeTopkRouter, Glm4MoeExperts)
_NORMS = (Qwen3RMSNorm, Qwen3MoeRMSNorm, Qwen2RMSNorm, LlamaRMSNorm, Glm4MoeRMSNorm)
_EVERYWHERE = {nn.Linear: _DeterministicLinear} | {kind: _by_thin_linear(kind) for kind in _ROUTED}
# What a device computes row by row of itself stays torch's, which is faster.
_BY_DEVICE = {"cpu": {SiLUActivation: _SiLU}, "cuda": {kind: _norm(kind) for kind in _NORMS}}
