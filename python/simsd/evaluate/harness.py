"""The model `simsd` of EleutherAI's lm-eval (https://github.com/EleutherAI/lm-evaluation-harness)."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from simsd.cli import options as opt
from simsd.config import EngineConfig, SamplingParams, config_with
from simsd.engine.engine import Engine
from simsd.engine.pair import SETTINGS, check_params
from simsd.errors import SimsdError
from simsd.evaluate.scoring import Scorer
from simsd.results import Stats
from simsd.seeds import sample_seed

# What tasks say of their requests, and what they call it.
_OF_TASKS = {"max_new_tokens": "max_gen_toks", "stop": "until", "temperature": "temperature"}
_THEIR_DEFAULT = "cuda:0"  # --device, where none is given, also on a machine without a GPU
_MODELS = ("pretrained", "draft", "batch_size", *SETTINGS)
_ENGINE = [field.name for field in dataclasses.fields(EngineConfig)]


@register_model("simsd")
class SimsdLM(TemplateLM):
    """Generates by `simsd.Engine`, natively or speculatively, and scores by `Scorer`.

    Args:
        pretrained: the target: a built-in name ("tiny-target", "long-target" ...), a checkpoint folder or a hub id.
        draft: the same for the draft, or "none"; auto: the one that goes with a built-in target, else none.
        dtype: auto (as stored), float32, bfloat16 or float16.
        device: auto (cuda if there is one), cpu, cuda ...
        batch_size: requests at a time, or "auto" (8); `max_batch` by another name.
        settings: of `simsd.load`, quantize, family, mask_token_id, shift, revision and local_files_only, for the draft
            draft_family, draft_shift and draft_revision; fields of `EngineConfig`, and those of `SamplingParams` that
            tasks say nothing of (verify, strategy, drafter, steps, seed, top_k ...), for every request whose task does
            not set them itself.

    Raises:
        SimsdError: an unknown argument, one that belongs to tasks, a bad value, models that do not fit together.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        draft: str | None = "auto",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not isinstance(pretrained, str):
            raise SimsdError("--model_args names the target, as in pretrained=tiny-target,draft=tiny-draft")
        if settings.pop("trust_remote_code", False):
            raise SimsdError("trust_remote_code: no code of a checkpoint is ever run, so there is nothing to trust")
        loading = {name: settings.pop(name) for name in SETTINGS if name in settings and name not in _ENGINE}
        engine, self.params = _configs(settings, batch_size)
        if device is None or (device == _THEIR_DEFAULT and not torch.cuda.is_available()):
            device = "auto"
        # lm-eval reads "none" as None in some of its ways to take arguments.
        draft = opt.draft_name(pretrained, None if draft == "auto" else draft or "none")
        loading |= {"dtype": dtype, "device": device, "block_length": engine.block_length}
        target, draft_model = opt.load_models(pretrained, draft, loading, engine.max_batch)
        if self.params.needs_draft_model and draft_model is None:
            asked = f"verify={self.params.verify},drafter={self.params.drafter}"
            raise SimsdError(f"{asked} needs a draft model: name one, as in draft=tiny-draft")
        self.engine = Engine(target, draft_model if self.params.asks_draft_model else None, engine)
        check_params(target, draft_model, self.params, self.engine.block_length)
        self.model, self.tokenizer = target, target.tokenizer.backend
        self.scorer = Scorer(target, self.engine.block_length)
        self.stats, self.seconds = Stats(), 0.0
        self._device = target.device

    # Text and tokens

    @property
    def eot_token_id(self) -> int:
        if not self.model.end_token_ids:
            raise SimsdError(f"{self.model.name} names no end token, which lm-eval puts before a text without context")
        return self.model.end_token_ids[0]

    @property
    def max_length(self) -> int:
        """Positions of the longest request, prompt and text."""
        return self.engine.capacity

    @property
    def tokenizer_name(self) -> str:
        return self.model.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text as it is: a chat template has been applied, or is not wanted."""
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.tokenizer.chat_template is None:
            raise SimsdError(f"the tokenizer of {self.model.name} has no chat template: drop --apply_chat_template")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # Requests

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of a task's `until` strings or `max_gen_toks` tokens (256 where it names none).

        Prompts are cut on the left to what the engine's `max_length` leaves for them, with a warning. Repeats of a
        request have seeds of their own: `simsd.seeds.sample_seed`.

        Raises SimsdError for generation settings that cannot be honoured, before anything is decoded.
        """
        asked = [request.args for request in requests]
        params = [self._params(kwargs) for _, kwargs in asked]
        texts: list[str] = [""] * len(requests)
        numbers: dict[int, int] = {}
        began = time.perf_counter()
        try:
            for place, (tokens, chosen) in enumerate(self._prompts(asked, params)):
                numbers[self.engine.add(tokens, chosen)] = place
            with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as progress:
                for update in self.engine.stream():
                    if (result := update.result) is None or (place := numbers.get(update.index)) is None:
                        continue  # it goes on, or is what an error has cancelled
                    if result.finish_reason == "failed":
                        raise SimsdError(f"{self.model.name}: {result.error}; try dtype=float32, or check its weights")
                    self.stats += result.stats
                    texts[place] = result.text
                    self.cache_hook.add_partial("generate_until", asked[place], result.text)
                    progress.update()
        except BaseException:
            for number in numbers:
                self.engine.cancel(number)
            raise
        self.seconds += time.perf_counter() - began
        return texts

    def _prompts(
        self, asked: list[tuple[str, dict[str, Any]]], params: list[SamplingParams]
    ) -> Iterator[tuple[list[int], SamplingParams]]:
        """Token ids that fit, and settings with a seed for each repeat."""
        repeats = collections.Counter()
        for (context, kwargs), chosen in zip(asked, params, strict=True):
            tokens, _ = maybe_truncate(self.tok_encode(context), chosen.max_new_tokens, self.max_length)
            same = context, repr(kwargs)
            seed = None if chosen.seed is None else sample_seed(chosen.seed, repeats[same])
            repeats[same] += 1
            yield tokens, dataclasses.replace(chosen, seed=seed)

    def _params(self, kwargs: dict[str, Any]) -> SamplingParams:
        """The settings of a request: the model's, and over them its task's."""
        wanted = normalize_gen_kwargs(kwargs, self.params.max_new_tokens)
        sampled = wanted.pop("do_sample")
        own = {
            "max_new_tokens": wanted.pop("max_gen_toks"),
            "stop": [string for string in wanted.pop("until") if string],
            "temperature": float(wanted.pop("temperature", 0.0)) if sampled else 0.0,
        }
        if wanted.get("num_beams") == 1:
            del wanted["num_beams"]
        return config_with(self.params, own | wanted, ("until", "max_gen_toks", "do_sample"), kind=SamplingParams)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether it is what greedy decoding gives) of continuations, see `Scorer`. Contexts are cut
        on the left to what the engine's `max_length` leaves for them."""
        scores = []
        for texts, context, continuation in tqdm(requests, desc="Scoring", disable=disable_tqdm):
            context, _ = maybe_truncate(context, len(continuation), self.max_length)
            scores.append(self.scorer.score(context, continuation))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, scores[-1])
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts behind an end token, in lm-eval's windows of `max_length` tokens; blocks are
        counted from the beginning of each window."""
        totals = []
        for (text,) in tqdm([request.args for request in requests], desc="Scoring", disable=disable_tqdm):
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length - 1, 1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes to its results: models, settings, and what decoding took."""
        draft = self.engine.draft
        speed = self.stats.new_tokens / self.seconds if self.seconds else None
        return {
            "target": self.model.name,
            "draft": None if draft is None else draft.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "block_length": self.engine.block_length,
            "engine": dataclasses.asdict(self.engine.config),
            "sampling": dataclasses.asdict(self.params),
            "generation": self.stats.to_dict() | {"seconds": self.seconds, "tokens_per_second": speed},
        }


def _configs(settings: dict[str, Any], batch_size: int | str) -> tuple[EngineConfig, SamplingParams]:
    """The engine's and the requests' settings among the arguments of a model."""
    if "verify" in settings:
        settings["verify"] = settings["verify"] or "none"
    for name, theirs in _OF_TASKS.items():
        if name in settings:
            raise SimsdError(f"{name} is for tasks to say: leave it out, or override theirs by --gen_kwargs {theirs}=")
    of_engine = {name: settings.pop(name) for name in _ENGINE if name in settings}
    if "max_batch" not in of_engine and batch_size != "auto":
        if not str(batch_size).isdecimal():
            raise SimsdError(f"batch_size must be an integer >= 1 or auto, got {batch_size!r}")
        of_engine["max_batch"] = int(batch_size)
    return EngineConfig(**of_engine), config_with(
        None, settings, dict.fromkeys([*_MODELS, *_ENGINE]), kind=SamplingParams
    )
