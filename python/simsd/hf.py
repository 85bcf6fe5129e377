"""SimSD inside transformers: `model.generate(**inputs, assistant_model=draft)`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn
from transformers import LogitsProcessorList, MaxLengthCriteria, MaxTimeCriteria, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    BaseStreamer,
    GenerateDecoderOnlyOutput,
    LogitNormalization,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from simsd.config import GenerationConfig
from simsd.engine.decoder import Decoder
from simsd.errors import SimsdError
from simsd.models import weights
from simsd.models.cache import CACHE_ARGUMENT
from simsd.models.generation import CustomGeneration
from simsd.models.loading import LoadedModel, load
from simsd.results import Result

_CANNOT = "hf_generate cannot honour"
# Fields of transformers' GenerationConfig that are honoured, or that mean nothing here.
_HONOURED = {
    "max_length",
    "max_new_tokens",
    "max_time",
    "stop_strings",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "renormalize_logits",  # changes scores, not what is drawn
    "num_return_sequences",
    "return_dict_in_generate",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "use_cache",
    "disable_compile",
    "transformers_version",
}
# The others must be None, False or, where neither is what they are when they have no effect, this.
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "cache_implementation": "dynamic",
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}
_PROCESSOR_FIELDS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
# What `generate` adds of its own accord to the arguments of a forward.
_FORWARD_ARGUMENTS = {
    "attention_mask",
    "position_ids",
    CACHE_ARGUMENT,
    "use_cache",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
}


@dataclasses.dataclass
class HFGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output, and `results`: one `simsd.Result` per row (step map, origins, finish reason, stats)."""

    results: list[Result] | None = None


@torch.no_grad()
def hf_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: transformers.GenerationConfig | None = None,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    *,
    assistant_model: nn.Module | LoadedModel | str | None = None,
    tokenizer=None,
    assistant_tokenizer=None,
    verify: str | None = None,
    drafter: str | None = None,
    lookahead: int | None = None,
    max_rows: int | None = None,
    accept: str | None = None,
    strategy: str | None = None,
    steps: int | None = None,
    sub_block_length: int | None = None,
    block_length: int | None = None,
    draft_steps: int | None = None,
    rejected_tail: str | None = None,
    threshold: float | None = None,
    entropy_bound: float | None = None,
    end_gate: float | None = None,
    seed: int | Sequence[int] | None = None,
    mask_token_id: int | None = None,
    **forward_arguments,
) -> Tensor | HFGenerateOutput:
    """The decoding loop of `model.generate(**inputs, assistant_model=draft, ...)`, also as `custom_generate=`.

    transformers prepares the arguments up to `streamer`; the named ones after it are given to `generate` as they are.
    Its generation config is honoured: max_new_tokens, max_length, max_time, eos_token_id (None: no end), pad_token_id,
    stop_strings (with `tokenizer=`), do_sample with temperature, top_k (transformers' default is 50) and top_p,
    num_return_sequences, return_dict_in_generate. All rows are decoded as one batch, each from the tokens that its
    attention mask counts; a row's text does not depend on the others, and a row that is done leaves the batch.

    Tokens are committed by the block (`verify="temporal"`: as far as they were accepted). Stopping criteria see one row
    [1, n] at a time, once for each of its committed tokens, and cut behind the first one at which they hold; rows take
    turns, so a criterion that keeps a state sees them mixed. max_time is looked at after each commit of each row, so
    every row gets at least one. A streamer receives the prompt, then each committed token, and takes one row; it is
    ended also where an error ends the call.

    Args:
        model: of a class of `simsd.models.families` (another module: `simsd.load(module).model`).
        input_ids: int64 [B, P], padded on either side; B counts the copies of num_return_sequences.
        assistant_model: the draft, of any class with a family's parameter names (a stock Qwen3ForCausalLM, say); block
            length and mask token are the target's where its configuration records none. Its weights are shared, not
            copied; one that is not of our own classes is best loaded once, by `simsd.load`, and not in every call. A
            name or folder is loaded in every call, too. None leaves drafting to the model itself (`verify="temporal"`:
            decodes natively).
        tokenizer: the model's, for stop strings; ids without an entry in it are then never generated.
        verify, drafter, lookahead, max_rows, accept, strategy, steps, sub_block_length, block_length, draft_steps,
            rejected_tail, threshold, entropy_bound, end_gate: see `simsd.GenerationConfig`; None is its default.
        seed: of the noise; an int, from which each copy of a prompt has its own as the samples of `simsd.generate(n=)`
            do, or one per row; None draws one per row from torch's generator, so that torch.manual_seed reproduces the
            text. Without do_sample nothing is drawn.
        mask_token_id: None: the model's.

    Returns:
        int64 [B, P + new tokens], the rows as they were given, then what was generated, padded on the right; with
        return_dict_in_generate an `HFGenerateOutput`.

    Raises:
        SimsdError: a setting, processor or argument that block diffusion cannot honour, by name, or one that
            `simsd.generate` refuses; raised before anything is decoded.
    """
    _refuse_arguments(model, generation_config, streamer, synced_gpus, assistant_tokenizer, input_ids)
    _refuse_fields(generation_config, model.generation_config)
    _refuse_processors(logits_processor or (), generation_config)
    mask = _counted(input_ids, forward_arguments)
    target = load(model, mask_token_id=mask_token_id, tokenizer=tokenizer)
    draft = None if assistant_model is None else _draft(assistant_model, target, mask_token_id)

    samples = bool(generation_config.do_sample)
    temperature = 1.0 if generation_config.temperature is None else generation_config.temperature
    end_ids = _ids(generation_config.eos_token_id)
    settings = {
        "verify": verify,
        "drafter": drafter,
        "lookahead": lookahead,
        "max_rows": max_rows,
        "accept": accept,
        "strategy": strategy,
        "steps": steps,
        "sub_block_length": sub_block_length,
        "block_length": block_length,
        "draft_steps": draft_steps,
        "rejected_tail": rejected_tail,
        "threshold": threshold,
        "entropy_bound": entropy_bound,
        "end_gate": end_gate,
        "temperature": temperature if samples else 0.0,
        "top_k": generation_config.top_k if samples else None,
        "top_p": generation_config.top_p if samples else None,
        "max_new_tokens": generation_config.max_length - input_ids.shape[1],
        "end_token_ids": end_ids,
        "seed": seed,
    }
    config = GenerationConfig(**{name: value for name, value in settings.items() if value is not None})
    seeds = _seeds(config, seed is not None, samples, len(input_ids), generation_config.num_return_sequences or 1)
    pad = next(iter(_ids(generation_config.pad_token_id) + end_ids), None)
    criteria = StoppingCriteriaList(c for c in stopping_criteria or () if not isinstance(c, MaxTimeCriteria))
    clocks = StoppingCriteriaList(c for c in stopping_criteria or () if isinstance(c, MaxTimeCriteria))
    ragged = len(input_ids) > 1 and any(not isinstance(c, MaxLengthCriteria) for c in (*criteria, *clocks))
    if ragged and pad is None:
        raise SimsdError("rows of different lengths are padded: set pad_token_id, got None and no eos_token_id")

    prompts = [target.encode_prompt(ids[kept].tolist()) for ids, kept in zip(input_ids, mask, strict=True)]
    decoder = Decoder(target, prompts, draft, config, seeds, max_batch=len(prompts))
    _decode(decoder, input_ids, criteria, clocks, streamer)
    results = decoder.results()
    if failed := [i for i, result in enumerate(results) if result.finish_reason == "failed"]:
        warnings.warn(f"{results[failed[0]].error} in rows {failed}, which end there", stacklevel=2)

    width = max(len(result.tokens) for result in results)
    sequences = torch.cat([input_ids, input_ids.new_full((len(results), width), pad or 0)], dim=1)
    for row, result in zip(sequences[:, input_ids.shape[1] :], results, strict=True):
        row[: len(result.tokens)] = row.new_tensor(result.tokens)
    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        return HFGenerateOutput(sequences=sequences, results=results)
    return sequences


def _decode(
    decoder: Decoder,
    rows: Tensor,
    criteria: StoppingCriteriaList,
    clocks: StoppingCriteriaList,
    streamer: BaseStreamer | None,
) -> None:
    """Runs the decoder; `rows` [B, P] are the prompts as given, with their padding, which the criteria see too."""
    start = rows.shape[1]
    seen = torch.cat([rows, rows.new_zeros(len(rows), decoder.config.max_new_tokens)], dim=1)
    lengths = [start] * len(rows)
    for update in decoder:
        row, length, stopped = seen[update.index, None], lengths[update.index], False
        for token in update.tokens:
            row[0, length] = token
            length += 1
            if streamer is not None:
                streamer.put(torch.tensor([token], device="cpu"))
            if stopped := bool(criteria(row[:, :length], None)):
                break
        lengths[update.index] = length
        if stopped or (update.tokens and clocks(row[:, :length], None)):
            decoder.stop(update.index, length - start)


def _draft(assistant: nn.Module | LoadedModel | str, target: LoadedModel, mask_token_id: int | None) -> LoadedModel:
    if isinstance(assistant, LoadedModel):
        return assistant
    if not isinstance(assistant, nn.Module):
        return load(assistant, mask_token_id=mask_token_id)
    _, recorded = weights.module_config(assistant)
    if mask_token_id is None and recorded.mask_token_id is None:
        mask_token_id = target.mask_token_id
    return load(assistant, block_length=recorded.block_length or target.block_length, mask_token_id=mask_token_id)


def _counted(input_ids: Tensor, forward_arguments: dict) -> Tensor:
    """bool [B, P], the prompt's tokens; refuses arguments of the forward that the loop would not pass on."""
    given = {name for name, value in forward_arguments.items() if value is not None}
    if unknown := sorted(given - _FORWARD_ARGUMENTS):
        raise SimsdError(f"{_CANNOT} {', '.join(unknown)}: it takes token ids and a 2-D attention_mask")
    past = forward_arguments.get(CACHE_ARGUMENT)
    if past is not None and (getattr(past, "_is_user_defined", False) or past.get_seq_length()):
        raise SimsdError(f"{_CANNOT} {CACHE_ARGUMENT}={type(past).__name__}: it keeps a cache of its own")
    mask = forward_arguments.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(input_ids)
    if mask.shape != input_ids.shape:
        raise SimsdError(f"attention_mask must be {list(input_ids.shape)} like input_ids, got {list(mask.shape)}")
    mask = mask.to(input_ids.device).ne(0)
    positions = forward_arguments.get("position_ids")
    if positions is not None:
        count = mask.long().cumsum(1) - 1
        if not torch.equal(positions.to(mask.device).expand_as(count)[mask], count[mask]):
            raise SimsdError(f"{_CANNOT} position_ids other than the running count of the attention_mask")
    return mask


def _refuse_arguments(
    model: PreTrainedModel,
    generation_config: transformers.GenerationConfig | None,
    streamer: BaseStreamer | None,
    synced_gpus: bool,
    assistant_tokenizer,
    input_ids: Tensor,
) -> None:
    if not isinstance(model, CustomGeneration):
        name = type(model).__name__
        raise SimsdError(
            f"hf_generate needs SDARForCausalLM, got {name}: use simsd.load(model, mask_token_id=...).model.generate"
        )
    if generation_config is None:
        raise SimsdError("hf_generate is not called by itself: model.generate(...) calls it")
    if synced_gpus:
        raise SimsdError(f"{_CANNOT} synced_gpus=True: it runs on one device")
    if assistant_tokenizer is not None:
        raise SimsdError(f"{_CANNOT} assistant_tokenizer: the draft must have the target's vocabulary")
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise SimsdError(f"input_ids must be integers [batch, tokens], got {input_ids.dtype} {list(input_ids.shape)}")
    if streamer is not None and len(input_ids) != 1:
        raise SimsdError(f"a streamer takes one row, got {len(input_ids)}: rows are decoded side by side")


def _refuse_fields(given: transformers.GenerationConfig, own: transformers.GenerationConfig) -> None:
    """Refuses every field of transformers' config that is set to something and not honoured.

    `own`: the model's. Published configurations have use_cache=False, left over from training, which asks for nothing.
    """
    refused = []
    for name in vars(transformers.GenerationConfig()).keys() - _HONOURED:
        value = getattr(given, name, None)
        if not (name.startswith("_") or value is None or value is False or value == _NEUTRAL.get(name)):
            refused.append(f"{name}={value!r}")
    if given.use_cache is False and own.use_cache is not False:
        refused.append("use_cache=False")
    if refused:
        raise SimsdError(f"{_CANNOT} {', '.join(sorted(refused))}: unset it, or decode with another custom_generate")


def _refuse_processors(processors: Sequence, given: transformers.GenerationConfig) -> None:
    """Refuses logits processors other than those that stand for the config's own sampling settings."""
    for processor in processors:
        kind = type(processor)
        field = _PROCESSOR_FIELDS.get(kind)
        if kind is LogitNormalization or (field and getattr(processor, field) == getattr(given, field)):
            continue
        name = "prefix_allowed_tokens_fn" if kind is PrefixConstrainedLogitsProcessor else kind.__name__
        advice = f"set {field}= instead" if field else "tokens are not decided from left to right"
        raise SimsdError(f"{_CANNOT} logits_processor {name}: {advice}")


def _seeds(config: GenerationConfig, given: bool, samples: bool, rows: int, copies: int) -> list[int]:
    """One seed per row. `given`: whether the caller named seeds."""
    if not given:
        return torch.randint(2**63 - 1, (rows,), device="cpu").tolist() if samples else [0] * rows
    if isinstance(config.seed, int):
        return dataclasses.replace(config, n=copies).seeds(rows // copies)
    return config.seeds(rows)


def _ids(given: int | Sequence[int] | Tensor | None) -> tuple[int, ...]:
    return () if given is None else tuple(torch.as_tensor(given, device="cpu").flatten().tolist())
