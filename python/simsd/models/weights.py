"""From a configuration and named tensors to a model, without copying what need not be copied."""

from __future__ import annotations

import copy
import itertools
import re
import weakref
from collections.abc import Container, Mapping, Sequence, Set

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from simsd.errors import SimsdError, one_line
from simsd.models import families
from simsd.models.attention import NAME
from simsd.models.block_causal import BlockCausalForward
from simsd.models.configuration import BlockDiffusionConfig
from simsd.models.families import Family
from simsd.models.quantized import converter, data_of, is_finite, is_quantized, rebuilt
from simsd.models.supported import check_config

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PACKED = re.compile(r".*\.mlp\.experts\.(gate_up_proj|down_proj)$")
# Their names differ in the second group alone.
_SIDE_BY_SIDE = re.compile(r"(.*\.)(q_proj|k_proj|v_proj|gate_proj|up_proj)(\.(?:weight|bias))$")
# Older transformers saved the RoPE frequencies, which follow from the configuration.
_DERIVED = re.compile(r".*rotary_emb\.inv_freq$")
# Models whose values were checked, with where their tensors lay and how often they had been written: `hf_generate`
# loads its model in every call.
_sound: weakref.WeakKeyDictionary[nn.Module, list[tuple[int, int]]] = weakref.WeakKeyDictionary()


def skeleton(source: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The model with every parameter on the meta device and with our attention, whatever `config` says of it.

    Raises SimsdError where transformers cannot build it.
    """
    config._attn_implementation = NAME
    try:
        with torch.device("meta"):
            return families.of_config(config).model_class(config)
    except Exception as error:  # whatever an odd value leads to in the modules' constructors
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise SimsdError(f"{source}: transformers cannot build its configuration ({reason})") from error


def parts(source: str, config: PreTrainedConfig, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Our tensors, by name, in one that the source's layout calls `name`: views of it. Of a tensor on the meta device
    they tell the shapes.

    Raises SimsdError where it has other rows than they.
    """
    code = families.of_config(config).code
    if not hasattr(code, "read_tensor"):
        return [(name, tensor)]
    names, rows = zip(*code.read_tensor(name, config), strict=True)
    if len(names) == 1:
        return [(names[0], tensor)]
    if len(tensor) != sum(rows):
        raise SimsdError(f"{source}: {name} has {len(tensor)} rows, its configuration {sum(rows)}")
    ends = list(itertools.accumulate(rows))
    return [(ours, tensor[end - count : end]) for ours, count, end in zip(names, rows, ends, strict=True)]


def by_source_name(tensors: Mapping[str, Tensor], names: Container[str]) -> dict[str, Tensor]:
    """The tensors of a model, or views of them, by the names that a source calls them, which are like `names`: one per
    expert unless these have the packed ones."""
    found = {}
    for name, value in tensors.items():
        if not _PACKED.match(name) or name in names:
            found[name] = value
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, matrices in enumerate(value):
            if kind == "down_proj":
                found[f"{prefix}.{expert}.down_proj.weight"] = matrices
            else:
                gate, up = matrices.chunk(2)
                found |= {f"{prefix}.{expert}.gate_proj.weight": gate, f"{prefix}.{expert}.up_proj.weight": up}
    return found


def _needed(model: PreTrainedModel, names: Container[str]) -> dict[str, Tensor]:
    """The model's tensors by its own names; a tied head only where `names` has it."""
    tied = model.config.tie_word_embeddings and HEAD not in names
    return {name: value for name, value in model.state_dict().items() if not (tied and name == HEAD)}


def check_shapes(source: str, model: PreTrainedModel, given: Mapping[str, list[int]]) -> None:
    """Raises SimsdError unless `given` (name -> shape) is what `model`, made from the source's config, needs."""
    given = {name: list(shape) for name, shape in given.items() if not _DERIVED.match(name)}
    expected = {name: list(value.shape) for name, value in by_source_name(_needed(model, given), given).items()}
    if missing := [name for name in expected if name not in given]:
        raise SimsdError(f"{source}: tensors are missing: {listing(missing)}")
    if surplus := [name for name in given if name not in expected]:
        raise SimsdError(f"{source}: tensors that its configuration has no place for: {listing(surplus)}")
    wrong = [f"{name} is {given[name]}, not {shape}" for name, shape in expected.items() if given[name] != shape]
    if wrong:
        raise SimsdError(f"{source}: shapes differ from its configuration: {listing(wrong)}")


def allocate(
    model: PreTrainedModel,
    names: Container[str],
    dtype: torch.dtype,
    device: torch.device,
    without: Set[str] = frozenset(),
    int8: Set[str] = frozenset(),
) -> dict[str, Tensor]:
    """Memory for the tensors of the skeleton `model` whose source has tensors of these `names`; not for those that it
    has by the names `without`, and bytes for those in `int8`.

    Matrices that the fused layers take in one product adjoin, as `join` would have them. Buffers are float32: what a
    router adds to its scores is small beside them.
    """
    buffers = {name for name, _ in model.named_buffers()}
    needed = _needed(model, names)
    sources = {name: by_source_name({name: value}, names) for name, value in needed.items()}
    needed = {name: value for name, value in needed.items() if without.isdisjoint(sources[name])}
    groups: dict[str, list[str]] = {}
    for name in needed:
        groups.setdefault(_SIDE_BY_SIDE.sub(r"\1\3", name), []).append(name)
    tensors = {}
    for group in groups.values():
        rows, first = [len(needed[name]) for name in group], needed[group[0]]
        kind = torch.float32 if group[0] in buffers else dtype
        kind = torch.int8 if not int8.isdisjoint(sources[group[0]]) else kind
        memory = torch.empty(sum(rows), *first.shape[1:], dtype=kind, device=device)
        tensors |= zip(group, memory.split(rows), strict=True)
    return tensors


def version_of(weight: Tensor) -> int:
    """Autograd's counter of what was written to it; 0 where it has none: it was made in inference mode."""
    try:
        return weight._version
    except RuntimeError:  # of a Parameter, `is_inference` does not tell
        return 0


def check_values(source: str, model: PreTrainedModel) -> None:
    """Raises SimsdError unless all weights have one dtype and they and the RoPE frequencies are finite.

    A NaN in the head's row of one token would not be seen in a text: `sample_logits` takes it for a token to leave out.
    Reads every weight, and a model that was sound again only where autograd's version counters tell that its weights
    were written since.
    """
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = [(part.data_ptr(), version_of(part)) for value in values.values() for part in data_of(value)]
    if _sound.get(model) == state:
        return
    odd = [f"{name} is {p.dtype}, not {model.dtype}" for name, p in model.named_parameters() if p.dtype != model.dtype]
    if odd:
        raise SimsdError(f"{source}: weights of several dtypes, give it one by dtype=: {listing(odd)}")
    if broken := [name for name, value in values.items() if not is_finite(value)]:
        raise SimsdError(f"{source}: not finite (NaN, or too large for {model.dtype}): {listing(broken)}")
    _sound[model] = state


def assemble(model: PreTrainedModel, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """Gives the skeleton `model` the storages of `tensors` (checked names and shapes) and returns it, in eval mode.

    The matrices of experts stored one by one are packed, layer by layer, into transformers' one tensor per layer.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not _DERIVED.match(name)}
    for name, value in model.state_dict().items():
        if _PACKED.match(name) and name not in tensors:
            tensors[name] = pack_experts(tensors, name, experts=len(value))
    if HEAD not in tensors:
        tensors[HEAD] = tensors[EMBEDDING]
    elif is_quantized(tensors[HEAD]) or not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        model.config.tie_word_embeddings = False  # whatever was configured: transformers, too, keeps a head of its own
    # Detached: the same storages, but parameters of our own.
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    if any(tensor.is_inference() for tensor in tensors.values()):
        model.requires_grad_(False)  # a module's that was made in inference mode: they never take gradients
    for name, tensor in tensors.items():
        if is_quantized(tensor):
            model.get_parameter(name).requires_grad_(False)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    # Its frequencies are no parameters: they were left on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(tensors[EMBEDDING].device)
    model.config.dtype = tensors[EMBEDDING].dtype
    return model.eval()


def pack_experts(tensors: dict[str, Tensor], name: str, experts: int) -> Tensor:
    """Takes the experts' matrices out of `tensors` and returns them in one tensor [experts, rows, columns]."""
    prefix, kind = name.rsplit(".", 1)
    parts = ("down_proj",) if kind == "down_proj" else ("gate_proj", "up_proj")
    sources = [[tensors.pop(f"{prefix}.{i}.{part}.weight") for part in parts] for i in range(experts)]
    first = sources[0][0]
    # A module that parameters belong to keeps its weights, now in the packed storage: no second copy stays.
    shared = isinstance(first, nn.Parameter)
    if not is_quantized(first):
        return _pack(sources, shared)
    values, scales = ([[getattr(one, part) for one in row] for row in sources] for part in ("qdata", "scale"))
    return rebuilt(first, _pack(values, shared), _pack(scales, shared), first.dtype)


def _pack(sources: Sequence[Sequence[Tensor]], shared: bool) -> Tensor:
    """[experts, rows, columns] of one or two matrices [rows, columns] for each expert; `shared`: these become views."""
    rows, columns = sources[0][0].shape
    packed = sources[0][0].new_empty(len(sources), len(sources[0]) * rows, columns)
    for expert, matrices in zip(packed, sources, strict=True):
        for source, view in zip(matrices, expert.split(rows), strict=True):
            with torch.no_grad():
                view.copy_(source)
            if shared:
                source.data = view
    return packed


@torch.inference_mode(False)
def join(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor [sum of rows, ..] of parameters [rows, ..], which are views of it from then on.

    Copies them only where they do not lie one behind the other in memory already.
    """
    first, end, adjoin = parameters[0], parameters[0].storage_offset(), True
    for parameter in parameters:
        same = parameter.untyped_storage()._cdata == first.untyped_storage()._cdata
        adjoin = adjoin and same and parameter.is_contiguous() and parameter.storage_offset() == end
        end += parameter.numel()
    rows = [len(parameter) for parameter in parameters]
    if adjoin:
        return first.detach().as_strided((sum(rows), *first.shape[1:]), first.stride())
    joined = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, view in zip(parameters, joined.split(rows), strict=True):
        parameter.data = view
    return joined


def is_ready(
    module: nn.Module, config: PreTrainedConfig, dtype: torch.dtype | None, device: torch.device | None
) -> bool:
    """Whether `module` is one of our models and, with these settings (None: any), can decode as it is."""
    return (
        isinstance(module, BlockCausalForward)
        and type(module.config) is type(config)
        and not module.training
        and module.config._attn_implementation == NAME
        and module.config.block_length == config.block_length
        and module.config.mask_token_id == config.mask_token_id
        and module.config.shift == config.shift
        and (dtype is None or all(parameter.dtype == dtype for parameter in module.parameters()))
        and device in (None, module.device)
        and not any(parameter.is_meta for parameter in module.parameters())
    )


_NOT_FIELDS = re.compile(r"_.*|model_type|architectures|auto_map|transformers_version|attn_implementation|.*dtype")


def make_config(source: str, place: str, family: Family, fields: dict, name_or_path: str) -> PreTrainedConfig:
    """The family's configuration, checked. Raises SimsdError, one line that begins with `source` or with `place`, where
    the fields are written."""
    fields = {field: value for field, value in fields.items() if field not in ("model_type", "auto_map")}
    try:
        if hasattr(family.code, "read_config"):
            fields = family.code.read_config(fields)
        config = family.config_class.from_dict(fields, name_or_path=name_or_path)
    except Exception as error:  # transformers' validation has a type of its own for each kind of mistake
        raise SimsdError(f"{place} is not valid: {one_line(error)}") from error
    check_config(source, config)
    return config


def module_config(module: nn.Module, family: Family | None = None) -> tuple[Family, PreTrainedConfig]:
    """The family of a module and our configuration, from its `.config` and from its parameter names."""
    source, given = type(module).__name__, getattr(module, "config", None)
    if given is None:
        raise SimsdError(f"{source} has no .config: a module in memory needs one with Qwen3's fields")
    is_moe = any(".mlp.experts." in name for name, _ in module.named_parameters())
    family = family or _family_of(given, is_moe)
    wanted = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    wanted += ["num_experts", "num_experts_per_tok", "moe_intermediate_size"] if family.name == "sdar_moe" else []
    if missing := [field for field in wanted if getattr(given, field, None) is None]:
        raise SimsdError(f"{source}: its config lacks {listing(missing)}")
    fields = given.to_dict() if hasattr(given, "to_dict") else dict(vars(given))
    fields = {field: value for field, value in fields.items() if not _NOT_FIELDS.fullmatch(field)}
    fields |= {field: getattr(given, field) for field in wanted}
    return family, make_config(source, f"{source}: its config", family, fields, getattr(given, "_name_or_path", ""))


def _family_of(config: object, is_moe: bool) -> Family:
    if isinstance(config, BlockDiffusionConfig):
        return families.of_config(config)
    model_type = getattr(config, "model_type", None)
    for family in families.FAMILIES:
        # Qwen3's own class stands for SDAR, whose names and fields are the same.
        if family.architecture is None and model_type in (family.name, *family.model_types) and model_type != "qwen3":
            return family
    return families.by_name("sdar_moe" if is_moe else "sdar")


def from_module(
    module: nn.Module, config: PreTrainedConfig, quantize: str | None, dtype: torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    """A model that shares the weights of `module`, which must have its family's parameter names; not those that are
    quantized for it, in `dtype` (None: their own) on `device`."""
    source = type(module).__name__
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    stored = module.state_dict(keep_vars=True)
    tensors |= {name: value for name, value in module.named_buffers() if name in stored}
    if any(".base_layer." in name for name in tensors):  # peft's
        raise SimsdError(f"{source} has an adapter that is not merged: load what its merge_and_unload() returns")
    if integers := [f"{name} is {value.dtype}" for name, value in tensors.items() if not value.is_floating_point()]:
        raise SimsdError(f"{source}: quantized or integer weights are not read: {listing(integers)}")
    model = skeleton(source, config)
    tensors = {ours: part for name, tensor in tensors.items() for ours, part in parts(source, config, name, tensor)}
    check_shapes(source, model, {name: list(tensor.shape) for name, tensor in tensors.items()})
    if empty := [name for name, tensor in tensors.items() if tensor.device.type == "meta"]:
        raise SimsdError(f"{source}: parameters without data (meta device): {listing(empty)}")
    convert = converter(source, quantize, dtype, device)
    model = assemble(model, {name: convert(name, tensor) for name, tensor in tensors.items()})
    if isinstance(given := getattr(module, "generation_config", None), GenerationConfig):
        model.generation_config = copy.deepcopy(given)
    return model


def listing(items: list[str], most: int = 4) -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest
