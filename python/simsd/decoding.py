"""The decoding loop: a batch of sequences, each iteration one target forward for all of them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simsd import layouts
from simsd.config import MAX_BLOCK_LENGTH, GenerationConfig, config_with, integer
from simsd.drafting import Sampler
from simsd.errors import SimsdError
from simsd.exact import Exact, copies_needed
from simsd.lanes import Lanes
from simsd.models.loading import LoadedModel, load
from simsd.policy import Policy, experience_of
from simsd.prompts import encode_prompts
from simsd.results import Result
from simsd.sequences import Sequence, Update
from simsd.side import Side
from simsd.temporal import Temporal
from simsd.values import plain

MAX_BATCH = 8
Model = LoadedModel | str | Path | nn.Module
Settings = GenerationConfig | Mapping[str, Any] | None


class Decoder:
    """Decodes prompts, at most `max_batch` at a time; iterate over it for an `Update` per sequence and iteration.

    Takes what `generate` takes. A sequence is one sample of one prompt. Sequences that are done leave the batch and
    waiting ones take their place. What a prompt's text is does not depend on the others. `cancel` and `stop` end one
    sequence and leave the others alone; iteration may be interrupted at any point and taken up again; `result(index)`
    holds what was committed until then.

    Args:
        seeds: one per sequence, in place of the config's.
    """

    def __init__(
        self,
        target: Model,
        prompts: Any,
        draft: Model | None = None,
        config: Settings = None,
        seeds: Seq[int] | None = None,
        max_batch: int = MAX_BATCH,
        **settings: Any,
    ) -> None:
        config = config_with(config, settings, others=("draft", "config", "max_batch"))
        max_batch = plain(max_batch)
        integer("max_batch", max_batch, 1)
        draft = _usable_draft(draft, config)
        if config.verify == "temporal" and draft is None:
            config = dataclasses.replace(config, verify="none")
        target = target if isinstance(target, LoadedModel) else load(target)
        if not isinstance(draft, LoadedModel | None):
            draft = load(draft) if isinstance(draft, nn.Module) else load(draft, device=target.device)
        target, draft = target.in_evaluation(), None if draft is None else draft.in_evaluation()
        self.target, self.draft, self.config = target, draft, config
        self.block_length = block_length(target, draft, config)
        config.block_steps(self.block_length)
        check_pair(target, draft)
        if config.stop and target.tokenizer is None:
            raise SimsdError(f"stop strings need a tokenizer, and {target.name} has none: use end_token_ids")
        prompts = encode_prompts(target, prompts)
        longest = max((len(prompt) for prompt in prompts), default=0)
        self.capacity = layouts.aligned(longest + config.max_new_tokens, self.block_length)
        check_length(self.capacity, longest, config, target, draft)
        self.end_ids = tuple(target.end_token_ids if config.end_token_ids is None else config.end_token_ids)
        samples = [prompt for prompt in prompts for _ in range(config.n)]
        seeds = config.seeds(len(prompts)) if seeds is None else GenerationConfig(seed=seeds).seeds(len(samples))
        self.sequences = [
            Sequence(i, prompt, seed, config, self.end_ids, target.tokenizer)
            for i, (prompt, seed) in enumerate(zip(samples, seeds, strict=True))
        ]
        self._waiting = collections.deque(self.sequences)
        self._batch = min(max_batch, len(samples))
        self._running: list[Sequence | None] = [None] * self._batch
        self._loop: Exact | Temporal | None = None
        self._unsettled = False

    def __iter__(self) -> Iterator[Update]:
        while True:
            yield from self._admit()
            if not any(self._running):
                return
            if self._unsettled:
                self._restore()
            self._unsettled = True
            moved = self._temporal_step() if isinstance(self._loop, Temporal) else self._exact_step()
            self._unsettled = False
            for sequence in moved:
                yield self._update(sequence)

    def _restore(self) -> None:
        """After an interrupt in the middle of an iteration: every lane again from what its sequence has committed."""
        for lane, sequence in enumerate(self._running):
            if sequence is None:
                continue
            sequence.stop(len(sequence.new), "")
            sequence.finish_reason = sequence.finish_reason or None
            self._lanes.rewrite(lane, sequence.tokens, 0)
            for side in self._sides:
                side.committed[lane] = min(side.committed[lane], self._lanes.starts[lane])
            if isinstance(self._loop, Exact):
                self._loop.masked[lane] = 0

    def _update(self, sequence: Sequence) -> Update:
        tokens, text = sequence.take()
        if sequence.finish_reason is not None:
            sequence.reported = True
            return Update(sequence.index, tokens, [], text, sequence.result())
        ahead = [] if sequence.unsettled else sequence.provisional[: sequence.limit - len(sequence.tokens)]
        end = next((i for i, token in enumerate(ahead) if token in self.end_ids), len(ahead) - 1)
        return Update(sequence.index, tokens, ahead[: end + 1], text)

    def _admit(self) -> Iterator[Update]:
        """Frees the lanes of what is done, however it came to be, and gives them to what waits."""
        for lane, sequence in enumerate(self._running):
            if sequence is not None and sequence.finish_reason is not None:
                self._lanes.close(lane)
                self._running[lane] = None
                if not sequence.reported:
                    yield self._update(sequence)
        for lane in range(self._batch):
            while self._running[lane] is None and self._waiting:
                # It waits until it is in: an interrupt on the way must not lose it.
                if self._waiting[0].finish_reason is None:
                    self._open(lane, self._waiting[0])
                    self._running[lane] = self._waiting.popleft()
                else:
                    yield self._update(self._waiting.popleft())

    def _open(self, lane: int, sequence: Sequence) -> None:
        if self._loop is None:
            self._build()
        sequence.touch()
        end = layouts.aligned(sequence.limit, self.block_length)
        self._lanes.open(lane, sequence.tokens, end, sequence.seed)
        for side in self._sides:
            side.open(lane)
        if isinstance(self._loop, Temporal):
            self._loop.open(lane, sequence.seed)
        else:
            self._loop.open(lane)

    def _build(self) -> None:
        target, config, length = self.target, self.config, self.block_length
        spare = (config.lookahead + 2) * length
        lanes = self._lanes = Lanes(self._batch, length, self.capacity + spare, config, target.device)
        # The mask token stays banned whatever ends a text.
        banned = [i for i in target.banned_ids if i not in self.end_ids or i == target.mask_token_id]
        banned = torch.tensor(banned, device=target.device)
        sampler = Sampler(config, length, banned, target.device, target.dtype)
        temporal = config.verify == "temporal"
        copies = 2 if temporal else copies_needed(config, length)
        target_side = Side(target, lanes, self.capacity, copies)
        draft_side = None if self.draft is None else Side(self.draft, lanes, self.capacity, 1)
        self._sides = [side for side in (target_side, draft_side) if side is not None]
        if temporal:
            self._loop = Temporal(lanes, target_side, draft_side, sampler, config, self.end_ids)
        else:
            experience = experience_of(target.model, None if self.draft is None else self.draft.model, target.device)
            policy = Policy(config, length, lanes.count, experience)
            self._loop = Exact(lanes, target_side, draft_side, sampler, config, policy)

    def _exact_step(self) -> list[Sequence]:
        moved = []
        for lane, step in self._loop.step().items():
            sequence = self._running[lane]
            self._count(lane, sequence)
            stats = sequence.stats
            if step.copies > 1:
                stats.target_verify_forwards += 1
            else:
                stats.target_denoise_forwards += 1
            stats.draft_denoise_forwards += step.draft_forwards
            stats.drafted += step.drafted
            stats.accepted += step.accepted
            if not step.finite:
                sequence.finish_reason = "failed"
            for tokens, steps, probs, origins in step.blocks:
                if sequence.finish_reason is None:
                    known = len(sequence.tokens) % self.block_length
                    sequence.commit(tokens[known:], steps[known:], probs[known:], origins[known:])
            sequence.provisional = step.provisional[len(sequence.tokens) % self.block_length :]
            moved.append(sequence)
        return moved

    def _temporal_step(self) -> list[Sequence]:
        moved = []
        lengths = [0 if sequence is None else len(sequence.tokens) for sequence in self._running]
        for lane, verdict in self._loop.step(lengths).items():
            sequence = self._running[lane]
            self._count(lane, sequence)
            stats = sequence.stats
            stats.target_verify_forwards += 1
            stats.draft_denoise_forwards += verdict.draft_forwards
            stats.drafted += verdict.drafted
            stats.accepted += verdict.accepted
            stats.bonus += verdict.bonus
            before = len(sequence.tokens)
            # A tail token is not the target's choice: its probability may vanish.
            if all(p > 0 or o == "tail" for p, o in zip(verdict.probs, verdict.origins, strict=True)):
                sequence.commit(verdict.tokens, verdict.steps, verdict.probs, verdict.origins, verdict.logprobs)
            else:
                sequence.finish_reason = "failed"
            if sequence.finish_reason is None:
                self._lanes.rewrite(lane, sequence.tokens, before)
            moved.append(sequence)
        return moved

    def _count(self, lane: int, sequence: Sequence) -> None:
        sequence.touch()
        names = ("target_prefill_forwards", "draft_prefill_forwards")
        for side, name in zip(self._sides, names, strict=False):
            setattr(sequence.stats, name, side.prefill_forwards[lane])

    def stop(self, index: int, count: int) -> None:
        """Ends a text behind its first `count` generated tokens, where a stop string or another criterion is met."""
        self.sequences[index].stop(count, "stop")

    def cancel(self, index: int) -> None:
        """Ends a sequence, waiting or running, where it is."""
        self.sequences[index].stop(None, "cancelled")

    def result(self, index: int = 0) -> Result:
        """What sequence number `index` has so far."""
        return self.sequences[index].result()

    def results(self) -> list[Result]:
        return [sequence.result() for sequence in self.sequences]


def generate(
    target: Model,
    prompts: Any,
    draft: Model | None = None,
    config: Settings = None,
    max_batch: int = MAX_BATCH,
    **settings: Any,
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
        max_batch: sequences to decode at a time; the texts do not depend on it.
        settings: fields of `GenerationConfig` by name, which override `config`'s.

    Returns:
        One result per prompt; with `n` samples per prompt, prompt by prompt.

    Raises:
        SimsdError: a bad prompt or setting, models that do not fit together, a sequence over the position limit; raised
            before anything is decoded.
    """
    decoder = Decoder(target, prompts, draft, config, max_batch=max_batch, **settings)
    for _ in decoder:
        pass
    return decoder.results()


def stream(
    target: Model,
    prompts: Any,
    draft: Model | None = None,
    config: Settings = None,
    max_batch: int = MAX_BATCH,
    **settings: Any,
) -> Iterator[Update]:
    """`generate` as it goes: an `Update` per sequence and iteration, the last of each with its result.

    Arguments are checked at once, not at the first update.
    """
    return iter(Decoder(target, prompts, draft, config, max_batch=max_batch, **settings))


def block_length(target: LoadedModel, draft: LoadedModel | None, config: GenerationConfig) -> int:
    """The block length to decode with: the config's, else the models' own, which must then agree."""
    if config.block_length is None and draft is not None and draft.block_length != target.block_length:
        raise SimsdError(
            f"target {target.name} has block length {target.block_length}, draft {draft.name} {draft.block_length}: "
            "use a pair of one block length or set block_length"
        )
    length = config.block_length or target.block_length
    if not 1 <= length <= MAX_BLOCK_LENGTH:
        raise SimsdError(f"block length must be in 1..{MAX_BLOCK_LENGTH}, got {length} from {target.name}")
    return length


def check_pair(target: LoadedModel, draft: LoadedModel | None) -> None:
    if draft is None:
        return
    for what in ("vocab_size", "mask_token_id", "device"):
        ours, theirs = getattr(target, what), getattr(draft, what)
        if ours != theirs:
            raise SimsdError(
                f"draft {draft.name} does not fit target {target.name}: "
                f"{what.replace('_', ' ')} {theirs} against {ours}"
            )


def check_length(
    capacity: int, prompt_tokens: int, config: GenerationConfig, target: LoadedModel, draft: LoadedModel | None
) -> None:
    for model in (target, draft):
        if model is not None and model.max_positions is not None and capacity > model.max_positions:
            raise SimsdError(
                f"{prompt_tokens} prompt tokens + max_new_tokens {config.max_new_tokens}, in whole blocks {capacity}, "
                f"exceed the {model.max_positions} positions of {model.name}: shorten the prompt or lower "
                "max_new_tokens"
            )


def _usable_draft(draft: Model | None, config: GenerationConfig) -> Model | None:
    if config.verify == "none" or (config.verify == "exact" and config.drafter == "self"):
        return None
    if config.verify == "exact" and config.drafter == "model" and draft is None:
        raise SimsdError("drafter='model' needs a draft model, got None: name one, or use drafter='auto' or 'self'")
    return draft
