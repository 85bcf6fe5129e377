"""The families of models that load. Each is a row here and, in a module of its own, the classes of transformers that it
is. Everything else (layers, cache, decoding) knows none of them.

Nothing here needs torch: `simsd models` lists the rows.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping
from types import ModuleType

from simsd.errors import SimsdError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """
    Attributes:
        name: what `simsd.load(..., family=)` takes.
        models: published models, in words.
        stock: the architecture in transformers that it is.
        checked: what its logits and texts were compared with.
        module: of this package; has the classes. It may have `read_config(fields) -> fields`, from published fields to
            those of the configuration class, and `read_tensor(name, config) -> [(name, rows), ..]`, the tensors that a
            published one holds one below the other.
        config, model: names of the classes there.
        model_types: that config.json may say. architecture: what it must name among its architectures besides.
        block_length, mask_token_id, end_token_ids, shift: where neither the caller nor the configuration says.
    """

    name: str
    models: str
    stock: str
    checked: str
    module: str
    config: str
    model: str
    model_types: tuple[str, ...] = ()
    architecture: str | None = None
    block_length: int | None = None
    mask_token_id: int | None = None
    end_token_ids: tuple[int, ...] = ()
    shift: bool = False

    @property
    def code(self) -> ModuleType:
        return importlib.import_module(f"{__name__}.{self.module}")

    @property
    def config_class(self) -> type:
        return getattr(self.code, self.config)

    @property
    def model_class(self) -> type:
        return getattr(self.code, self.model)


FAMILIES = (
    Family(
        name="sdar",
        models="SDAR, TraDo",
        stock="Qwen3",
        checked="transformers' Qwen3 under SDAR's mask; published configurations of SDAR-4B-Chat and SDAR-8B-Chat",
        module="sdar",
        config="SDARConfig",
        model="SDARForCausalLM",
        model_types=("sdar",),
    ),
    Family(
        name="sdar_moe",
        models="SDAR-30B-A3B",
        stock="Qwen3-MoE",
        checked="transformers' Qwen3-MoE under SDAR's mask",
        module="sdar",
        config="SDARMoeConfig",
        model="SDARMoeForCausalLM",
        model_types=("sdar_moe",),
    ),
    Family(
        name="qwen3",
        models="BD3LM on Qwen3 (dllm-hub), fine-tunes of Qwen3",
        stock="Qwen3",
        checked="dllm's modeling_qwen3.py and samplers/bd3lm.py (ZHZisZZ/dllm ca17675)",
        module="a2d",
        config="A2DQwen3Config",
        model="A2DQwen3ForCausalLM",
        model_types=("a2d-qwen3", "simsd_qwen3"),
        block_length=32,
    ),
    Family(
        name="qwen2",
        models="BD3LM on Qwen2 (dllm), fine-tunes of Qwen2 and Qwen2.5",
        stock="Qwen2",
        checked="dllm's modeling_qwen2.py (ZHZisZZ/dllm ca17675)",
        module="a2d",
        config="A2DQwen2Config",
        model="A2DQwen2ForCausalLM",
        model_types=("a2d-qwen2", "simsd_qwen2"),
        block_length=32,
    ),
    Family(
        name="fast_dllm_v2",
        models="Fast-dLLM v2 1.5B, 7B (sub-blocks of 8)",
        stock="Qwen2",
        checked="modeling.py of Fast_dLLM_v2_7B with its generate (Satgoy152/DualDiffusion 189fa7a)",
        module="fast_dllm",
        config="FastDLLMConfig",
        model="FastDLLMForCausalLM",
        model_types=("Fast_dLLM_Qwen", "simsd_fast_dllm"),
        block_length=32,
        mask_token_id=151665,
        end_token_ids=(151645,),
        shift=True,
    ),
    Family(
        name="llama",
        models="BD3LM on Llama (dllm), fine-tunes of Llama",
        stock="Llama",
        checked="dllm's modeling_llama.py (ZHZisZZ/dllm ca17675)",
        module="a2d",
        config="A2DLlamaConfig",
        model="A2DLlamaForCausalLM",
        model_types=("a2d-llama", "simsd_llama"),
        block_length=32,
    ),
    Family(
        name="stable_diffcoder",
        models="Stable-DiffCoder-8B",
        stock="Llama",
        checked="modeling_stable_diffcoder.py of Stable-DiffCoder-8B-Instruct (2026-03-09)",
        module="a2d",
        config="A2DLlamaConfig",
        model="A2DLlamaForCausalLM",
        model_types=("llama",),
        architecture="StableDiffcoderForCausalLM",
        block_length=4,
        mask_token_id=5,
    ),
    Family(
        name="llada2",
        models="LLaDA2.0-mini, LLaDA2.0-flash",
        stock="GLM-4 MoE",
        checked="modeling_llada2_moe.py with its generate (ZHZisZZ/dllm ca17675)",
        module="llada2",
        config="LLaDA2Config",
        model="LLaDA2ForCausalLM",
        model_types=("llada2_moe", "simsd_llada2"),
        block_length=32,
        mask_token_id=156895,
        end_token_ids=(156892,),
    ),
)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Models that are known and not decoded, unless the caller names a family: `pattern` matches their model_type, an
    architecture of theirs, or the name of their folder."""

    models: str
    pattern: str
    reason: str


_WHOLE = "it denoises the whole sequence at once, so that no block is ever finished and its keys and values kept"
REFUSALS = (
    Refusal("Dream", r"^(Dream|DreamModel|DreamForCausalLM)$", _WHOLE),
    Refusal("LLaDA", r"^(llada|llada_moe|LLaDAModelLM|LLaDAMoEModelLM)$", _WHOLE),
    Refusal("MDLM", r"(^|[-_.])mdlm([-_.]|$)", _WHOLE),
    Refusal(
        "LLaDA2.1",
        r"LLaDA2\.1",
        "its token editing changes what is revealed, and here that stays: family='llada2' decodes it without",
    ),
    Refusal(
        "DiffusionGemma",
        r"^(diffusion_gemma|DiffusionGemma\w*)$",
        "its renoising masks what was revealed again, and here what is revealed stays",
    ),
    Refusal(
        "Efficient-DLM",
        r"^(edlm|EfficientDLM)$",
        "its published code was not to be had to compare with: its tensors have Qwen3's names, so family='qwen3',"
        " block_length=32, mask_token_id=151662 loads it, unchecked",
    ),
)


def by_name(name: object) -> Family:
    """The family of that name. Raises SimsdError where there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise SimsdError(f"family must be one of {', '.join(family.name for family in FAMILIES)}, got {name!r}")


def of_checkpoint(source: str, fields: Mapping[str, object]) -> Family:
    """The family of a checkpoint named `source` with these fields in its config.json.

    Raises:
        SimsdError: it is of none, or of one that cannot be decoded; says which are.
    """
    model_type, architectures = fields.get("model_type"), fields.get("architectures")
    named = [str(name) for name in architectures] if isinstance(architectures, list) else []
    found = [family for family in FAMILIES if model_type in family.model_types]
    for refusal in REFUSALS:
        if any(re.search(refusal.pattern, text) for text in (str(model_type), *named, _published_name(source))):
            raise SimsdError(f"{source}: {refusal.models} is not supported: {refusal.reason}")
    for family in found:
        if family.architecture is None or family.architecture in named:
            return family
    raise SimsdError(f"{source}: model_type {model_type!r} is not supported{_advice(model_type)}")


def _published_name(folder: str) -> str:
    """That of a folder, or of the repository whose snapshot it is."""
    snapshot = re.search(r"models--[^/\\]*--([^/\\]+)[/\\]snapshots[/\\][^/\\]+$", folder)
    return snapshot[1] if snapshot else re.split(r"[/\\]", folder)[-1]


def of_config(config: object) -> Family:
    """The first family whose configurations are of that class."""
    return next(family for family in FAMILIES if family.config == type(config).__name__)


def _advice(model_type: object) -> str:
    same = [family.name for family in FAMILIES if family.name == model_type]
    if same:
        return (
            f" without saying how it was trained: if it decodes by blocks, pass family={same[0]!r}, block_length= and"
            f" mask_token_id= (and shift=True where a row predicts the next position); to commands, --family {same[0]}"
            " and so on, or --draft-family of a draft"
        )
    types = dict.fromkeys(name for family in FAMILIES for name in (*family.model_types, family.name))
    return f": {', '.join(types)} are"
