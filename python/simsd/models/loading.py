"""`simsd.load`: from a name, a folder, a hub id or a module in memory to a model that decodes."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simsd.ambient import undisturbed
from simsd.config import MAX_BLOCK_LENGTH
from simsd.errors import OutOfMemoryError, SimsdError, one_line
from simsd.models import adapters, checkpoint, families, folders, weights
from simsd.models.configuration import DEFAULT_BLOCK_LENGTH, named_block_length
from simsd.models.deterministic import (
    check_supported,
    is_deterministic,
    make_deterministic,
    preferable,
    read_quantized_experts,
    use_thin_linear,
    uses_thin_linear,
)
from simsd.models.families import Family
from simsd.models.fused import layers_of
from simsd.models.quantized import check_method, check_products, data_of, is_quantized, method_of, quantization
from simsd.models.tokenizer import MASK, Prompt, Tokenizer, check_ids, known_ids, read_tokenizer

# Names in transformers of ways to spread a model's layers.
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model with what decoding needs to know of it."""

    model: PreTrainedModel
    tokenizer: Tokenizer | None  # None: prompts are token ids
    block_length: int
    mask_token_id: int
    end_token_ids: tuple[int, ...]
    name: str
    deterministic: bool = False  # see `load`
    thin_linear: bool = False  # see `load`
    load_seconds: float = 0.0  # that `load` took, a download included
    folder: Path | None = None  # of its weights; None: it was a module in memory

    @property
    def config(self):
        return self.model.config

    @property
    def shift(self) -> bool:
        """Whether the logits of a row are those of the next position."""
        return self.model.config.shift

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def max_positions(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def quantize(self) -> str | None:
        """How its weights are stored, as `load(quantize=)` calls it; None: in `dtype`."""
        return method_of(self.model.model.layers.parameters())

    @property
    def banned_ids(self) -> list[int]:
        """Ids never generated: the mask token's, and those without an entry in the tokenizer that are no end tokens."""
        every = set(range(self.vocab_size))
        known = every if self.tokenizer is None else self.tokenizer.ids.union(self.end_token_ids)
        return sorted(every - known | {self.mask_token_id})

    @property
    def device(self) -> torch.device:
        return self.model.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.model.embed_tokens.weight.dtype

    @property
    def weight_bytes(self) -> int:
        """Of its parameters and buffers on their device; a tied head counts once."""
        every = (*self.model.parameters(), *self.model.buffers())
        return sum(part.nbytes for weight in every for part in data_of(weight))

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, see `Tokenizer.encode_prompt`; without a tokenizer only ids are taken."""
        if self.tokenizer is not None:
            return self.tokenizer.encode_prompt(prompt)
        if isinstance(prompt, str):
            raise SimsdError(f"{self.name} has no tokenizer: give the prompt as a list of token ids")
        return check_ids(prompt, self.vocab_size, self.mask_token_id)

    def in_evaluation(self) -> LoadedModel:
        """Itself or, where the module was put into training mode, the same weights in one that is not."""
        if not self.model.training:
            return self
        shared = load(self.model, block_length=self.block_length, mask_token_id=self.mask_token_id)
        return replace(self, model=shared.model)


@torch.inference_mode(False)
@undisturbed()
def load(
    source: str | Path | nn.Module = "tiny-target",
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: dict[str, int | str | torch.device] | str | None = None,
    quantize: str | None = None,
    family: str | None = None,
    block_length: int | None = None,
    mask_token_id: int | None = None,
    shift: bool | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    deterministic: bool | None = None,
    thin_linear: bool | None = None,
) -> LoadedModel:
    """Loads a block-diffusion model of one of the families in `simsd.models.families` (`simsd models` lists them).

    A checkpoint decides the model, its block length and its tokens, not how it is computed: an attention that its
    config.json names is not used. Of its generation_config.json the end tokens count; the sampling settings there
    (SDAR's: temperature 0.6, top-k 20, top-p 0.95) are honoured by `hf_generate`, as by transformers, while
    `simsd.generate` does what its own `GenerationConfig` says: greedy, by default.

    Args:
        source: "tiny-target", "tiny-draft", "long-target" or "long-draft" (the built-in pairs, for short and for long
            answers), a checkpoint folder in Hugging Face format, a hub id, the folder or hub id of an adapter (LoRA),
            which peft merges into the model that its adapter_config.json names, or a module in memory with a family's
            parameter names and `.config`, whose weights are shared, not copied (unless `dtype` or `device` moves them).
            One of our own, ready to decode, is taken itself. The matrices of experts held one by one are packed, and
            query, key and value matrices as well as gate and up matrices laid side by side; the module is left with
            views of these.
        dtype: "float32", "bfloat16", "float16" or the torch dtype, to which every weight is cast; None or "auto": as
            transformers has it, the configuration's dtype, else that of the first tensor in the file.
        device: of the model; None: CPU, or the module's.
        device_map: as transformers has it, where it puts the whole model on one device ("cuda:1", {"": 1}); layers are
            not spread over several.
        quantize: "int8", "int4" or "float8": weights of the decoder's layers are stored so, by torchao; activations,
            embeddings, norms, routers and the head stay in `dtype`. None: as the source has them, checkpoints that
            transformers and torchao stored so included. See docs/quantization.md for what each keeps and costs.
        family: None: by what the configuration says of itself, which that of a fine-tune with a plain model_type
            (qwen3, qwen2, llama) does not: name it then, with block_length and mask_token_id.
        block_length: 1 to 64; None: the configuration's `block_length`, `block_size` or `bd_size`, else that in the
            name of a published checkpoint (32 of SDAR-8B-Chat-b32), else the family's, else 4.
        mask_token_id: None: the configuration's, else the family's, else that of the tokenizer's `<|MASK|>` or mask
            token.
        shift: whether the logits of a row are those of the next position; None: as the configuration or the family has
            it.
        tokenizer: for a model that comes without one: a transformers tokenizer or its folder.
        revision: of a hub id: branch, tag or commit; None: main.
        cache_dir: for what comes from the hub; None: HF_HOME's or HF_HUB_CACHE's.
        token: for gated and private repositories; None: that of `hf auth login` or HF_TOKEN.
        local_files_only: whether to take a hub id from the cache alone, as HF_HUB_OFFLINE=1 does for all.
        deterministic: in decoding a row's logits do not depend, to the last bit, on how many rows share its forward;
            exact decoding equals native decoding bit for bit only then. True: nor in the module's own forward, on the
            CPU or on CUDA (see `simsd.models.deterministic`); a module in memory is left as it is, the model only
            shares its weights. None: on every device and in every dtype, where the fused layers know the architecture
            (else not, see `LoadedModel.deterministic`; nor with weights in int4 or float8, whose products are
            torchao's); in the module's own forward where that costs nothing (float32 on a CPU with AVX2 or AVX-512); a
            module of ours in memory stays what it is. False: products are torch's.
        thin_linear: on any device, `torch.ops.simsd.thin_linear` computes the model's linear layers (`nn.Linear`, with
            the head). On a GPU it is meant for the few rows of decoding. Nothing else changes, so other operations may
            still notice how many rows there are: that is what `deterministic` adds, of which this is a part. None: as
            `deterministic` has it; a module in memory that is not deterministic stays what it is.

    Raises:
        SimsdError: one line that says what is wrong with which argument or file; nothing is left half loaded.
    """
    begin = time.perf_counter()
    wanted_dtype, wanted_device = _dtype(dtype), _device(_one_device(device, device_map))
    kind = None if family is None else families.by_name(family)
    if deterministic and thin_linear is False:
        raise SimsdError(
            "deterministic=True computes linear layers by thin_linear, got thin_linear=False: drop one of the two"
        )
    check_method(quantize)
    # What is small is read and checked first: a mistake should not cost the time of reading the weights.
    folder, adapter, backend = None, None, None
    if isinstance(source, nn.Module):
        if revision is not None:
            raise SimsdError(f"revision={revision!r} is for hub ids, got a module: leave it out")
        name, (kind, config) = type(source).__name__, weights.module_config(source, kind)
    elif isinstance(source, str | Path):
        hub = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        folder = folders.find(source, revision=revision, **hub)
        name = folder.resolve().name if Path(source).is_dir() else str(source)
        if adapters.is_adapter(folder):
            adapter, folder = folder, adapters.find_base(folder, **hub)
            backend = read_tokenizer(adapter)
        (kind, config), backend = checkpoint.read_config(folder, kind), backend or read_tokenizer(folder)
        wanted_dtype = wanted_dtype or checkpoint.own_dtype(folder, config)
    else:
        raise SimsdError(f"load takes a name, a folder, a hub id or a module, got {type(source).__name__}")
    if tokenizer is not None:
        backend = read_tokenizer(Path(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer
        if backend is None:
            raise SimsdError(f"{tokenizer} holds no tokenizer")
    highest = -1 if backend is None else max(known_ids(backend), default=-1)
    if highest >= config.vocab_size:
        raise SimsdError(f"{name}: the ids of its tokenizer go up to {highest}, its model's to {config.vocab_size - 1}")
    config.block_length = _block_length(block_length, config, kind)
    config.mask_token_id = _mask_token_id(name, mask_token_id, config, backend, kind)
    config.shift = _shift(shift, config, kind)
    device = wanted_device or (next(source.parameters()).device if folder is None else torch.device("cpu"))
    if deterministic:
        check_supported(config, device)
    if quantize is not None:
        quantization().check(quantize, config, wanted_dtype or config.dtype, device)
    # By which method weights will be quantized, or are.
    stored = method_of(source.parameters()) if folder is None else checkpoint.method(folder, config)
    if adapter is not None and stored is not None:
        raise SimsdError(f"{folder} is quantized ({stored}): merge {adapter} into what it was made of, then quantize=")
    method = quantize or stored
    if method not in (None, "int8"):
        check_products(method, deterministic, thin_linear)
        deterministic = thin_linear = False
    if deterministic is None and thin_linear is not None:
        deterministic = False
    # What decoding does, and whether the module's own forward does it, too.
    by_itself = bool(deterministic)
    if deterministic is None:
        deterministic = getattr(source, "deterministic", True)
        by_itself = is_deterministic(source) if folder is None else preferable(config, device, wanted_dtype)
    if thin_linear is None:
        stays = folder is None and not is_deterministic(source) and uses_thin_linear(source)
        thin_linear = by_itself or stays

    if folder is None:
        model = source
        is_ready = weights.is_ready(source, config, wanted_dtype, wanted_device) and (
            (source.deterministic, is_deterministic(source), uses_thin_linear(source))
            == (deterministic, by_itself, thin_linear)
            and quantize in (None, method_of(source.model.layers.parameters()))
        )
        if not is_ready:
            model = weights.from_module(source, config, quantize, wanted_dtype, device)
            _move(model, wanted_dtype, wanted_device)
    else:
        with _memory_for(name, device):
            model = checkpoint.load_model(folder, config, None if adapter else quantize, wanted_dtype, device)
        if adapter is not None:
            adapters.merge(model, adapter)
            if quantize is not None:
                model = weights.from_module(model, config, quantize, wanted_dtype, device)
    if method is not None and not getattr(model, "is_quantized", False):
        quantization().declare(model)
    model.deterministic = deterministic
    if by_itself and not is_deterministic(model):
        make_deterministic(model)
    elif thin_linear and not uses_thin_linear(model):
        use_thin_linear(model)
    if method == "int8":
        read_quantized_experts(model)
    _fuse(model, source)
    weights.check_values(name, model)
    return LoadedModel(
        model=model,
        tokenizer=None if backend is None else Tokenizer(backend, config.vocab_size, config.mask_token_id),
        block_length=config.block_length,
        mask_token_id=config.mask_token_id,
        end_token_ids=_end_token_ids(name, model, backend, kind),
        name=name,
        deterministic=deterministic and layers_of(model).row_invariant,
        thin_linear=thin_linear,
        load_seconds=time.perf_counter() - begin,
        folder=folder,
    )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise SimsdError(f"dtype must be auto or {', '.join(DTYPES)} (name or torch dtype), got {dtype!r}")
    return chosen


def _one_device(device: torch.device | str | None, device_map: object) -> object:
    """The device that both name. Raises SimsdError for a map of several."""
    if device_map is None:
        return device
    if device is not None:
        raise SimsdError(f"device={str(device)!r} and device_map={device_map!r} say the same: give one of them")
    places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    named = {str(place) for place in places}
    if not named:
        raise SimsdError(f"device_map must name a device, got {device_map!r}")
    if len(named) == 1 and named.isdisjoint((*_SPREADING, "disk")):
        return places[0]
    if not named.isdisjoint(("cpu", "disk", "meta")):
        raise SimsdError(
            f"device_map={device_map!r} would offload weights, all of which every forward reads: use device="
        )
    raise SimsdError(
        f"device_map={device_map!r} would spread a model's layers over devices, which is not supported: load it on one"
        " (device=), quantized if it must be smaller, its draft on another (draft_device=); more GPUs serve by replicas"
    )


def _device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise SimsdError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return chosen


def _move(model: PreTrainedModel, dtype: torch.dtype | None, device: torch.device | None) -> None:
    model.to(device=device)
    for parameter in model.parameters() if dtype is not None else ():
        if not is_quantized(parameter):
            parameter.data = parameter.data.to(dtype)  # not the RoPE frequencies, which stay float32
    model.config.dtype = dtype or model.config.dtype


@contextlib.contextmanager
def _memory_for(name: str, device: torch.device) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(
            f"{name}: the memory of {device} does not hold its weights: take dtype='bfloat16', quantize= or another"
            f" device ({one_line(error)})"
        ) from error


def _fuse(model: PreTrainedModel, source: object) -> None:
    """Lays weights side by side, as the fused layers take them. A source that shares them still does afterwards."""
    theirs = dict(source.named_parameters()) if isinstance(source, nn.Module) and source is not model else {}
    shared = [
        (mine, other)
        for name, weight in model.named_parameters()
        if name in theirs
        for mine, other in zip(data_of(weight), data_of(theirs[name]), strict=False)
        if mine.data_ptr() == other.data_ptr()
    ]
    layers_of(model)
    for mine, other in shared:
        if mine.data_ptr() != other.data_ptr():
            other.data = mine.data


def _block_length(given: int | None, config, family: Family) -> int:
    length = given if given is not None else config.block_length
    named = named_block_length(config.name_or_path)
    if given is None and named not in (None, length):
        warnings.warn(
            f"{config.name_or_path} has blocks of {length} by its config.json and of {named} by its name: {length} is"
            f" taken; if the name is right, pass block_length={named}",
            stacklevel=3,
        )
    length = family.block_length or DEFAULT_BLOCK_LENGTH if length is None else length
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= MAX_BLOCK_LENGTH:
        raise SimsdError(f"block_length must be an integer from 1 to {MAX_BLOCK_LENGTH}, got {length!r}")
    return length


def _mask_token_id(
    name: str, given: int | None, config, backend: PreTrainedTokenizerBase | None, family: Family
) -> int:
    mask = given if given is not None else config.mask_token_id
    mask = family.mask_token_id if mask is None else mask
    if mask is None and backend is not None:
        mask = backend.get_vocab().get(MASK, backend.mask_token_id)
    if mask is None:
        raise SimsdError(f"{name}: neither its configuration nor a tokenizer names the mask token: pass mask_token_id=")
    if isinstance(mask, bool) or not isinstance(mask, int) or not 0 <= mask < config.vocab_size:
        raise SimsdError(f"mask_token_id must be an id from 0 to {config.vocab_size - 1}, got {mask!r}")
    return mask


def _shift(given: bool | None, config, family: Family) -> bool:
    if given is not None and not isinstance(given, bool):
        raise SimsdError(f"shift must be True or False, got {given!r}")
    own = config.shift if given is None else given
    return family.shift if own is None else own


def _end_token_ids(
    name: str, model: PreTrainedModel, backend: PreTrainedTokenizerBase | None, family: Family
) -> tuple[int, ...]:
    """Those of generation config, configuration and tokenizer, in that order, each once; the family's if there are
    none."""
    sources = (model.generation_config, model.config, backend)
    named = (getattr(source, "eos_token_id", None) for source in sources)
    lists = (ids if isinstance(ids, list | tuple) else [ids] for ids in named)
    end_ids = [i for ids in lists for i in ids if i is not None]
    for i in end_ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < model.config.vocab_size:
            raise SimsdError(f"{name}: eos_token_id must be ids from 0 to {model.config.vocab_size - 1}, got {i!r}")
    return tuple(dict.fromkeys(end_ids)) or family.end_token_ids
