"""`model.generate` by block diffusion, and what a callable `custom_generate` needs beyond transformers' own."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from simsd.errors import SimsdError

# What transformers 5.17 to 5.24 takes out of the call and does not hand to a callable `custom_generate`.
_DROPPED = ("assistant_model", "streamer", "tokenizer", "assistant_tokenizer", "synced_gpus")


class CustomGeneration:
    """Mixed into models: `generate` decodes by `simsd.hf_generate` unless another `custom_generate` is named, and hands
    it the arguments that its signature names.

    transformers drops some of them (`_DROPPED`), has then lost the tokenizer that `stop_strings` need, and refuses
    several sequences per prompt where it sees an assistant. A `custom_generate` from the hub goes straight to
    transformers.
    """

    def generate(self, *args, **kwargs):
        """transformers' `generate`; see `simsd.hf_generate` for what is honoured and for the settings that it adds.

        Where it raises, its streamer is ended before, so that who reads it in another thread does not wait for ever.
        """
        given = inspect.signature(super().generate).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        custom = given.pop("custom_generate", None)
        if isinstance(custom, str):
            return super().generate(*args, **kwargs)
        streamer = given.get("streamer")
        try:
            return self._generate_by(custom or _hf_generate(), given)
        except BaseException:
            if streamer is not None:
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    streamer.end()
            raise

    def init_continuous_batching(self, *args, **kwargs):
        """Refused, and with it `generate_batch` and `cache_implementation="paged"`."""
        raise SimsdError(
            "transformers' continuous batching decodes token by token, which block diffusion does not: call "
            "model.generate or simsd.generate, which take several prompts at once"
        )

    def _generate_by(self, custom, given: dict):
        named = inspect.signature(custom).parameters
        handed = {name: given[name] for name in _DROPPED if name in named and given.get(name) is not None}
        if "assistant_model" in handed:
            del given["assistant_model"]
        self._stop_strings_to_criterion(given)
        return super().generate(**given, custom_generate=functools.partial(custom, **handed))

    def _stop_strings_to_criterion(self, given: dict) -> None:
        """Replaces stop strings, wherever they are set, by a criterion; without a tokenizer transformers complains."""
        config, tokenizer = given.get("generation_config"), given.get("tokenizer")
        places = given.get("stop_strings"), getattr(config, "stop_strings", None), self.generation_config.stop_strings
        strings = next((strings for strings in places if strings is not None), None)
        if strings is None or tokenizer is None:
            return
        criteria = given.get("stopping_criteria") or ()
        given["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStrings(tokenizer, strings)])
        if config is not None:
            given["generation_config"] = config = copy.copy(config)
            config.stop_strings = None
        if config is None or "stop_strings" in given or self.generation_config.stop_strings is not None:
            given["stop_strings"] = None


def _hf_generate():
    from simsd.hf import hf_generate  # which needs the models, which are made of the class above

    return hf_generate


class StopStrings(StoppingCriteria):
    """Holds where the newest token completes one of `strings` in the decoded text, special tokens included.

    transformers' StopStringCriteria works on the pieces of the vocabulary and fails for word-level tokenizers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: str | list[str]):
        self.tokenizer = tokenizer
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        # A character takes four tokens at most (its bytes in UTF-8).
        self.window = 4 * (1 + max(map(len, self.strings), default=0))

    def __call__(self, input_ids: Tensor, scores=None, **kwargs) -> Tensor:
        return torch.tensor([self._completed(row) for row in input_ids.tolist()], device=input_ids.device)

    def _completed(self, ids: list[int]) -> bool:
        tail = ids[-self.window :]
        before, after = self._text(tail[:-1]), self._text(tail)
        return any(after.rfind(string) > before.rfind(string) for string in self.strings)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
