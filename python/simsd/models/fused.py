"""Layers of Qwen3, Qwen2, Llama and GLM-4 MoE in four matrix products and five ops each, on the transformers modules'
own weights.

A layer's query, key and value matrices lie side by side in memory, and so do its gate and up matrices: one product
takes them all, the module's parameters are views of it, nothing is stored twice. Architectures that these layers do not
know are left to the stock modules (`simsd.models.stock`), which define what is right.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import os
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.glm4_moe import modeling_glm4_moe as glm
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as dense
from transformers.models.qwen3_moe import modeling_qwen3_moe as moe

from simsd.models.attention import unchecked
from simsd.models.cache import BlockCache
from simsd.models.deterministic import affordable, is_deterministic, stock_class, uses_thin_linear
from simsd.models.experts import mixture_of_experts
from simsd.models.quantized import has_row_scales, is_quantized, operands, stored
from simsd.models.stock import Attend, StockLayers
from simsd.models.weights import join
from simsd_kernels import add_rms_norm, qk_norm_rope_store, silu_mul, thin_linear, validate

_LAYERS = (
    dense.Qwen3DecoderLayer,
    moe.Qwen3MoeDecoderLayer,
    qwen2.Qwen2DecoderLayer,
    llama.LlamaDecoderLayer,
    glm.Glm4MoeDecoderLayer,
)
_ATTENTIONS = (
    dense.Qwen3Attention,
    moe.Qwen3MoeAttention,
    qwen2.Qwen2Attention,
    llama.LlamaAttention,
    glm.Glm4MoeAttention,
)
_NORMS = (dense.Qwen3RMSNorm, moe.Qwen3MoeRMSNorm, qwen2.Qwen2RMSNorm, llama.LlamaRMSNorm, glm.Glm4MoeRMSNorm)
_MLPS = (dense.Qwen3MLP, moe.Qwen3MoeMLP, qwen2.Qwen2MLP, llama.LlamaMLP, glm.Glm4MoeMLP)
_MIXTURES = (moe.Qwen3MoeSparseMoeBlock, glm.Glm4MoeMoE)
_ROUTERS = (moe.Qwen3MoeTopKRouter, glm.Glm4MoeTopkRouter)
_EXPERTS = (moe.Qwen3MoeExperts, glm.Glm4MoeExperts)
_ROTARIES = (
    dense.Qwen3RotaryEmbedding,
    moe.Qwen3MoeRotaryEmbedding,
    qwen2.Qwen2RotaryEmbedding,
    llama.LlamaRotaryEmbedding,
    glm.Glm4MoeRotaryEmbedding,
)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_SILU = (SiLUActivation, nn.SiLU)
# Attributes of modules that a fused forward depends on.
_SETTINGS = ("variance_epsilon", "scaling", "sliding_window", "max_norm", "attention_scaling")

# The layers of models that are in use. They hold a model's modules, never the model itself.
_known: weakref.WeakKeyDictionary[nn.Module, FusedLayers] = weakref.WeakKeyDictionary()


def layers_of(model: PreTrainedModel) -> FusedLayers | StockLayers:
    """What runs the model's rows: fused layers where they know everything about it, else the stock modules.

    Costs microseconds where nothing changed since the last call; weights that were replaced since are joined anew.
    """
    known = _known.get(model)
    if known is not None and known.is_current():
        return known
    if obstacle(model) is not None:
        _known.pop(model, None)
        return StockLayers(model)
    _known[model] = FusedLayers(model)
    return _known[model]


def obstacle(model: PreTrainedModel) -> str | None:
    """What keeps the fused layers from serving the model; None if nothing does."""
    if _has_any_global_hook():
        return "every module has a hook"
    for name, module, kinds in _replaced(model):
        if stock_class(module) not in kinds:
            return f"{name} is {type(module).__name__}"
        if any(_hooks(module)) or "forward" in vars(module):
            return f"{name} has a hook"
        if getattr(module, "bias", None) is not None and name.split()[0] not in _PROJECTIONS:
            return f"{name} has a bias"
        if getattr(module, "sliding_window", None) is not None or getattr(module, "max_norm", None) is not None:
            return f"{name} has a sliding window or a maximal norm"
        if "q_norm" in module._modules and module.q_norm.variance_epsilon != module.k_norm.variance_epsilon:
            return f"{name} norms queries by another epsilon than keys"
    for i, layer in enumerate(model.model.layers):
        if len({getattr(layer.self_attn, name).bias is None for name in _PROJECTIONS}) > 1:
            return f"attention {i} has biases on some of its queries, keys and values"
        if len({is_quantized(getattr(layer.self_attn, name).weight) for name in _PROJECTIONS}) > 1:
            return f"attention {i} has some of its queries, keys and values quantized"
    weights = [w for _, module, _ in _replaced(model) for w in module._parameters.values() if w is not None]
    first = weights[0]
    if first.dtype not in validate.FLOATS or any((w.dtype, w.device) != (first.dtype, first.device) for w in weights):
        return "weights of several dtypes or devices, or of one that the ops do not know"
    if any(type(w) not in (nn.Parameter, FakeTensor) and not has_row_scales(w) for w in weights):
        return "weights that are no plain tensors"
    if any(map(is_quantized, weights)) and not _is_thin(model):
        return "quantized weights whose products are not thin_linear's"
    return None


def _is_thin(model: PreTrainedModel) -> bool:
    device = model.model.embed_tokens.weight.device
    return uses_thin_linear(model) or (model.deterministic and affordable(device))


def _replaced(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, tuple[type, ...]]]:
    """The modules that a fused forward does not call, and what each must be: a parent before its children."""
    base, linear = model.model, (nn.Linear,)
    yield "embed_tokens", base.embed_tokens, (nn.Embedding,)
    yield "rotary_emb", base.rotary_emb, _ROTARIES
    yield "layers", base.layers, (nn.ModuleList,)
    for i, layer in enumerate(base.layers):
        yield f"layer {i}", layer, _LAYERS
        attention, mlp = layer.self_attn, layer.mlp
        yield f"attention {i}", attention, _ATTENTIONS
        for name in (*_PROJECTIONS, "o_proj"):
            yield f"{name} {i}", getattr(attention, name), linear
        head_norms = [attention._modules[name] for name in ("q_norm", "k_norm") if name in attention._modules]
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, *head_norms):
            yield f"a norm of layer {i}", norm, _NORMS
        yield f"mlp {i}", mlp, (*_MLPS, *_MIXTURES)
        if (shared := mlp._modules.get("shared_experts")) is not None:
            yield f"shared experts {i}", shared, _MLPS
        for dense_mlp in (mlp, shared):
            if stock_class(dense_mlp) in _MLPS:
                for name in ("gate_proj", "up_proj", "down_proj"):
                    yield f"{name} {i}", getattr(dense_mlp, name), linear
                yield f"activation {i}", dense_mlp.act_fn, _SILU
    yield "norm", base.norm, _NORMS
    yield "lm_head", model.lm_head, linear


def _hooks(module: nn.Module) -> tuple[dict, dict]:
    return module._forward_hooks, module._forward_pre_hooks


@dataclasses.dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    qkv: tuple[Tensor, ...]  # as `linear` takes it: the weight or, quantized, int8 values and scales
    qkv_bias: Tensor | None
    heads: tuple[int, int, int]
    q_norm: Tensor | None
    k_norm: Tensor | None
    scale: float
    output: tuple[Tensor, ...]
    mlp_norm: Tensor
    mlp: Callable[[Tensor], Tensor]
    epsilons: tuple[float, float, float]  # of input_norm, of q_norm and k_norm, of mlp_norm


class FusedLayers:
    """Attributes:
    device, dtype: of the weights.
    row_invariant: whether a row's bits do not depend on the number of rows.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        base = model.model
        self.device, self.dtype = base.embed_tokens.weight.device, base.embed_tokens.weight.dtype
        self._backend = os.environ.get("SIMSD_BACKEND")
        self._is_thin = _is_thin(model)
        self._linear = self._op(thin_linear) if self._is_thin else nn.functional.linear
        self._norm, self._silu_mul = self._op(add_rms_norm), self._op(silu_mul)
        self._rope_store = self._op(qk_norm_rope_store)
        self.row_invariant = self._is_thin

        self._watched = [module for _, module, _ in _replaced(model)]  # by `is_current`
        self._joined: list[Tensor] = []
        self._layers = [self._fuse(layer, is_deterministic(model)) for layer in base.layers]
        self._embedding, self._head = base.embed_tokens.weight, operands(*stored(model.lm_head.weight))
        self._last_norm, self._last_epsilon = base.norm.weight, base.norm.variance_epsilon
        self._rotary = base.rotary_emb

        # What `is_current` compares.
        parents = [model, base, base.layers, *(m for layer in base.layers for m in (layer, layer.self_attn, layer.mlp))]
        parents += [shared for layer in base.layers if (shared := layer.mlp._modules.get("shared_experts")) is not None]
        children, attributes = [m._modules for m in parents], [vars(m) for m in self._watched]
        self._kinds = [type(module) for module in self._watched]
        self._hooks = [hooks for module in self._watched for hooks in _hooks(module)]
        self._owners = children + attributes  # a `forward` of a module's own is one attribute more
        self._counts = [len(owner) for owner in self._owners]
        tensors = [m._parameters for m in self._watched] + [self._rotary._buffers]
        tensors += [vars(w) for owner in tensors for w in owner.values() if w is not None and is_quantized(w)]
        known = [(owner, name) for owner in children + tensors for name in owner]
        known += [(owner, name) for owner in attributes for name in _SETTINGS if name in owner]
        self._known = [owner for owner, _ in known], [name for _, name in known], [owner[n] for owner, n in known]
        if any(isinstance(weight, FakeTensor) for weight in self._joined):
            self._joined = []  # they have no addresses
        self._addresses = [weight.data_ptr() for weight in self._joined]

    def _op(self, function: Callable) -> Callable:
        return unchecked(function, self.device, self.dtype)

    def _fuse(self, layer: nn.Module, deterministic: bool) -> _Layer:
        attention, dim = layer.self_attn, layer.self_attn.head_dim
        projections = [getattr(attention, name).weight for name in _PROJECTIONS]
        biases = [bias for name in _PROJECTIONS if (bias := getattr(attention, name).bias) is not None]
        self._joined += biases
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        input_norm, mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        return _Layer(
            input_norm=input_norm.weight,
            qkv=self._join(projections),
            qkv_bias=join(biases) if biases else None,
            heads=tuple(len(weight) // dim for weight in projections),
            q_norm=None if norms[0] is None else norms[0].weight,
            k_norm=None if norms[1] is None else norms[1].weight,
            scale=attention.scaling,
            output=operands(*stored(attention.o_proj.weight)),
            mlp_norm=mlp_norm.weight,
            mlp=self._mlp(layer.mlp, deterministic),
            epsilons=tuple((norm or input_norm).variance_epsilon for norm in (input_norm, norms[0], mlp_norm)),
        )

    def _join(self, weights: list[nn.Parameter]) -> tuple[Tensor, ...]:
        """Weights side by side, as `linear` takes them."""
        parts = list(zip(*map(stored, weights), strict=True))
        self._joined += itertools.chain(*parts)
        return operands(*map(join, parts))

    def _mlp(self, mlp: nn.Module, deterministic: bool) -> Callable[[Tensor], Tensor]:
        """The MLP half of a layer: [M, H], normed, to [M, H]."""
        if stock_class(mlp) in _MIXTURES:
            if self._is_thin and _is_known_mixture(mlp):
                self._watched += [mlp.gate, mlp.experts, mlp.experts.act_fn]
                if "shared_experts" not in mlp._modules:
                    return lambda x: mixture_of_experts(mlp, x)
                shared = self._mlp(mlp.shared_experts, deterministic)
                return lambda x: mixture_of_experts(mlp, x).add_(shared(x))
            self.row_invariant = self.row_invariant and deterministic
            return lambda x: mlp(x[None])[0]
        gate_up, down = self._join([mlp.gate_proj.weight, mlp.up_proj.weight]), operands(*stored(mlp.down_proj.weight))
        linear, silu_mul = self._linear, self._silu_mul
        return lambda x: linear(silu_mul(linear(x, *gate_up)), *down)

    def is_current(self) -> bool:
        """Whether modules, their classes and forwards, hooks, weights, settings and the choice of a backend are those
        that this was made of."""
        owners, names, values = self._known
        return (
            all(map(operator.is_, map(dict.get, owners, names), values))
            and list(map(type, self._watched)) == self._kinds
            and list(map(len, self._owners)) == self._counts
            and not (any(self._hooks) or _has_any_global_hook())
            and list(map(Tensor.data_ptr, self._joined)) == self._addresses
            and os.environ.get("SIMSD_BACKEND") == self._backend
        )

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [..., D] of positions [...]: transformers' own bits."""
        angles = positions.float().unsqueeze(-1) * self._rotary.inv_freq.float()
        angles = torch.cat((angles, angles), -1)
        return tuple((wave(angles) * self._rotary.attention_scaling).to(self.dtype) for wave in (torch.cos, torch.sin))

    def forward(
        self,
        tokens: Tensor,
        slots: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: BlockCache,
        attend: Attend,
        rows: Tensor | None,
        *,
        packed: bool,
    ) -> Tensor | None:
        """See `StockLayers.forward`."""
        linear, norm, rope_store = self._linear, self._norm, self._rope_store
        (seen_keys, seen_values), (all_keys, all_values) = cache.stored(), cache.stored(packed)
        x, residual = None, self._embedding.index_select(0, tokens.flatten())  # [M, H], M = A * N
        for i, layer in enumerate(self._layers):
            epsilon, qk_epsilon, mlp_epsilon = layer.epsilons
            heads = layer.heads
            qkv = linear(norm(x, residual, layer.input_norm, epsilon), *layer.qkv)
            if layer.qkv_bias is not None:
                qkv.add_(layer.qkv_bias)
            q, k, v = qkv.view(*slots.shape, sum(heads), -1).split_with_sizes(heads, 2)
            q = rope_store(q, k, v, layer.q_norm, layer.k_norm, *rope, all_keys[i], all_values[i], slots, qk_epsilon)
            x = linear(attend(q, seen_keys[i], seen_values[i], layer.scale), *layer.output)
            x = layer.mlp(norm(x, residual, layer.mlp_norm, mlp_epsilon))
        if rows is None:
            return None
        x, residual = x.index_select(0, rows), residual.index_select(0, rows)
        return linear(norm(x, residual, self._last_norm, self._last_epsilon), *self._head)


def _is_known_mixture(block: nn.Module) -> bool:
    """Whether `mixture_of_experts` computes what the block does."""
    parts = {block: _MIXTURES, block.gate: _ROUTERS, block.experts: _EXPERTS}
    weights = block.experts.gate_up_proj, block.experts.down_proj
    if any(is_quantized(weight) and not has_row_scales(weight) for weight in weights):
        return False
    return stock_class(block.experts.act_fn) in _SILU and all(
        stock_class(part) in kinds and not any(_hooks(part)) and "forward" not in vars(part)
        for part, kinds in parts.items()
    )
