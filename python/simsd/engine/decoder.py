"""The prompts of one call on an engine of their own: `simsd.generate`, `simsd.stream`, `simsd.Decoder`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from simsd.config import GenerationConfig, config_with
from simsd.decode.iteration import PARTS, Parts
from simsd.decode.rows import aligned
from simsd.engine.engine import Engine, Model
from simsd.engine.request import Update
from simsd.errors import SimsdError
from simsd.models.loading import LoadedModel, load
from simsd.prompts import encode_prompts
from simsd.results import Result

Settings = GenerationConfig | Mapping[str, Any] | None


class Decoder:
    """Decodes prompts with the same settings, at most `max_batch` at a time; iterate over it for an `Update` per
    request and iteration.

    Takes what `generate` takes. A request is one sample of one prompt. What its text is does not depend on the others.
    `cancel` and `stop` end one and leave the others alone; iteration may be interrupted at any point and taken up
    again; `result(index)` holds what was committed until then.

    Args:
        seeds: one per request, in place of the config's. parts: see `Engine`.
    """

    def __init__(
        self,
        target: Model,
        prompts: Any,
        draft: Model | None = None,
        config: Settings = None,
        seeds: Seq[int] | None = None,
        *,
        parts: Parts = PARTS,
        **settings: Any,
    ) -> None:
        config = config_with(config, settings, others=("draft", "config"))
        draft = _usable_draft(draft, config)
        target = target if isinstance(target, LoadedModel) else load(target)
        prompts = encode_prompts(target, prompts)
        samples = [prompt for prompt in prompts for _ in range(config.n)]
        seeds = config.seeds(len(prompts)) if seeds is None else GenerationConfig(seed=seeds).seeds(len(samples))
        longest = max((len(prompt) for prompt in prompts), default=0) + config.max_new_tokens
        slots = max(min(config.max_batch, len(samples)), 1)
        self.engine = Engine(target, draft, config.engine(max_length=max(longest, 1), max_batch=slots), parts=parts)
        self.config = config
        self._results: list[Result | None] = [None] * len(samples)
        for prompt, seed in zip(samples, seeds, strict=True):
            self.engine.add(prompt, config.sampling(seed))

    def __len__(self) -> int:
        """How many requests there are."""
        return len(self._results)

    @property
    def target(self) -> LoadedModel:
        return self.engine.target

    @property
    def draft(self) -> LoadedModel | None:
        return self.engine.draft

    @property
    def block_length(self) -> int:
        return self.engine.block_length

    @property
    def capacity(self) -> int:
        """Positions of the longest request, in whole blocks."""
        return aligned(self.engine.capacity, self.block_length)

    @property
    def end_ids(self) -> tuple[int, ...]:
        return tuple(self.target.end_token_ids if self.config.end_token_ids is None else self.config.end_token_ids)

    def __iter__(self) -> Iterator[Update]:
        for update in self.engine.stream():
            if update.result is not None:
                self._results[update.index] = update.result
            yield update

    def stop(self, index: int, count: int) -> None:
        """Ends a text behind its first `count` generated tokens, where a stop string or another criterion is met."""
        self.engine.stop(index, count)
        if self._results[index] is not None:
            self._results[index] = self.engine.result(index)

    def cancel(self, index: int) -> None:
        """Ends a request, waiting or running, where it is."""
        self.engine.cancel(index)

    def result(self, index: int = 0) -> Result:
        """What request number `index` has so far."""
        return self._results[index] or self.engine.result(index)

    def results(self) -> list[Result]:
        return [self.result(index) for index in range(len(self._results))]


def generate(
    target: Model, prompts: Any, draft: Model | None = None, config: Settings = None, **settings: Any
) -> list[Result]:
    """Decodes every prompt and returns the results in order.

    Equal seed, prompt and settings give equal texts: whatever else is in the batch and, under `verify="exact"` and
    "none", whoever drafts.

    Args:
        target: the model whose text it is (`simsd.load`); a built-in name, a folder, a hub id or a module is loaded, by
            every call anew.
        prompts: one prompt or a list of them; a prompt is a string (sent as a user turn through the chat template where
            there is one), a chat (a list of {"role", "content"}) or token ids (a list, an array or a tensor).
        draft: a smaller model with the target's vocabulary, or what loads one (on the target's device); None leaves
            drafting to the target itself (`verify="exact"`) or decodes natively (`verify="temporal"`).
        config: settings, as a `GenerationConfig` or a dict of its fields; `GenerationConfig()` by default.
        settings: fields of `GenerationConfig` by name, which override `config`'s.

    Returns:
        One result per prompt; with `n` samples per prompt, prompt by prompt.

    Raises:
        SimsdError: a bad prompt or setting, models that do not fit together, a sequence over the position limit; raised
            before anything is decoded.
    """
    decoder = Decoder(target, prompts, draft, config, **settings)
    for _ in decoder:
        pass
    return decoder.results()


def stream(
    target: Model, prompts: Any, draft: Model | None = None, config: Settings = None, **settings: Any
) -> Iterator[Update]:
    """`generate` as it goes: an `Update` per request and iteration, the last of each with its result.

    Arguments are checked at once, not at the first update.
    """
    return iter(Decoder(target, prompts, draft, config, **settings))


def _usable_draft(draft: Model | None, config: GenerationConfig) -> Model | None:
    if not config.asks_draft_model:
        return None
    if config.verify == "exact" and config.drafter == "model" and draft is None:
        raise SimsdError(
            "drafter='model' needs a draft model, got None: name one, or use drafter='auto', 'self' or 'lookup'"
        )
    return draft
