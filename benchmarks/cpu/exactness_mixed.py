"""Mixed batches of exactness.py: one running engine for requests that differ in every setting.

Requests are added between iterations, while others run; some are cancelled before they run, others on their way. Which
settings a request has, when it comes and when it is cancelled is drawn at random from fixed seeds.

In crowded ones every prompt comes several times, so that requests share keys and values, and there is memory for few
tokens more than the longest request needs, so that they drive each other out; texts are longer.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from simsd import Engine, EngineConfig, GenerationConfig, LoadedModel, Metrics, Result, generate
from simsd.config import DRAFTERS, REJECTED_TAILS, RULES, STRATEGIES
from simsd.decode.rows import aligned
from simsd.engine.loop import STOP_IDS
from simsd.engine.pages import page_bytes

from .exactness_settings import BUILT_IN, END, NEAR, UNLIKE, model, prompts, sub_block_lengths

MIXED = "mixed batches, requests come and go in a running engine"
WAITING, RUNNING = 0.08, 0.1  # parts of the requests that are cancelled before they run, and on their way
CROWDED = "mixed batches, prompts come again and memory is short"
AGAIN = 3  # times that a prompt comes in a crowded mix
SPARE = 2  # pages there besides those that the longest request needs
# Requests per slot and iteration: at times slots are free, at times requests wait; in a crowded mix they often do.
ARRIVAL, CROWDED_ARRIVAL = 0.15, 0.4

# Targets and block lengths (None: the target's own); drafts and settings of engines.
TARGETS = (
    ("tiny-target", None),
    ("tiny-target", 8),
    ("block 4", None),
    ("block 5", None),
    ("block 8", None),
    ("block 16", None),
    ("GQA 8", None),
    ("hidden size 72, 3 layers", None),
    ("bfloat16", None),
    ("MoE", None),
    ("shift", None),
    ("Qwen2, shift", None),
    ("LLaDA2", None),
)
ENGINES = (
    (NEAR, {"max_batch": 3, "lookahead": 2}),
    (UNLIKE, {"max_batch": 8, "lookahead": 3}),
    (None, {"max_batch": 8, "lookahead": 1, "max_rows": 64}),
    (NEAR, {"max_batch": 32, "lookahead": 4, "max_rows": 256}),
    (NEAR, {"max_batch": 6, "lookahead": 2, "page_size": 16}),
    (NEAR, {"max_batch": 8, "lookahead": 2, "draft_device": "cpu"}),
    (NEAR, {"max_batch": 6, "lookahead": 1, "page_size": 16, "draft_device": "cpu"}),
)


@dataclass(frozen=True)
class Mix:
    """An engine and the requests that it is given while it runs.

    Attributes:
        target, draft: names of models (see `model`); draft None: none.
        config: of the engine; batch: its max_batch.
        numbers: which of the target's prompts, one request for each, in order of arrival.
        seed: of when requests come and are cancelled, how they are verified, and who drafts.
    """

    target: str
    draft: str | None
    config: EngineConfig
    numbers: tuple[int, ...]
    seed: int

    @property
    def crowded(self) -> bool:
        return self.config.page_size == 16

    @property
    def group(self) -> str:
        return CROWDED if self.crowded else MIXED

    @property
    def batch(self) -> int:
        return self.config.max_batch

    @property
    def name(self) -> str:
        length = f", block length {self.config.block_length}" if self.config.block_length else ""
        draft = f"draft {self.draft.rpartition('/')[2]}" if self.draft else "no draft model"
        draft += " beside the target" if self.config.draft_device else ""
        rows = "" if self.config.max_rows is None else f", max_rows {self.config.max_rows}"
        return f"{self.target}{length}: {draft}, batch {self.batch}, lookahead {self.config.lookahead}{rows}"


@dataclass(frozen=True)
class Job:
    """A request for prompt `number`.

    `cancel`: updates of the request after which it is cancelled; 0: before it runs, None: never.
    """

    number: int
    config: GenerationConfig
    cancel: int | None


def sampling(target: str, number: int, block_length: int | None) -> GenerationConfig:
    """What decides the text of prompt `number`; the same in every mix, so that native texts are shared."""
    chance = random.Random(f"{target}, {block_length}, {number}")
    built_in = target in BUILT_IN
    # Twelve are more than the device looks for: the host finds the others.
    ends = ((),) if built_in else ((), tuple(chance.sample(range(1, END), 12)), (26, 45))
    length, strategy = block_length or model(target).block_length, STRATEGIES[number % len(STRATEGIES)]
    steps = chance.choice((None, None, *range(1, length + 1)))
    sub_block_length = chance.choice((None, None, *sub_block_lengths(length, steps, strategy)))
    strings = (), (" ",), ("1", "ANSWER"), ("4", "is a"), ("a", "=", ")"), ("never said",)
    return GenerationConfig(
        block_length=block_length,
        max_new_tokens=chance.randint(1, 48 if built_in else 30),
        steps=steps,
        sub_block_length=sub_block_length,
        strategy=strategy,
        threshold=chance.choice((0.3, 0.6, 0.85)),
        entropy_bound=chance.choice((0.1, 0.5, 2.0)),
        # At 0.8 the built-in target nearly always says what it says at 0.
        temperature=chance.choice((0.0, 0.8, 3.0 if built_in else 1.3)),
        top_k=chance.choice((0, 0, 5, 20)),
        top_p=chance.choice((1.0, 1.0, 0.9, 0.5)),
        seed=chance.randint(-5, 5),
        stop=chance.choice(strings) if built_in else (),
        end_token_ids=chance.choice((None, None, *ends)),
    )


def jobs(mix: Mix) -> list[Job]:
    """The requests of a mix: exact in the main, some native, some temporal."""
    chance = random.Random(mix.seed)
    found = []
    for number in mix.numbers:
        config = sampling(mix.target, number, mix.config.block_length)
        if mix.crowded:
            config = replace(config, max_new_tokens=4 * config.max_new_tokens)
        verify = chance.choices(("exact", "none", "temporal"), (8, 1, 1 if mix.draft else 0))[0]
        drafting = {"draft_steps": chance.choice((None, None, 1, 2) if mix.draft else (None,))}
        if verify == "exact":
            drafting["drafter"] = chance.choice(DRAFTERS if mix.draft else ("auto", "self", "lookup"))
            drafting["order_sharpness"] = chance.choice((None, 0.0, 3.0))
        elif verify == "temporal":
            drafting |= {"accept": chance.choice(RULES), "rejected_tail": chance.choice(REJECTED_TAILS)}
            gateable = len(config.end_token_ids or ()) <= STOP_IDS  # others an engine may refuse
            drafting["end_gate"] = chance.choice((0.0, 0.5)) if gateable else 0.0
        draw = chance.random()
        cancel = 0 if draw < WAITING else chance.randint(1, 6) if draw < WAITING + RUNNING else None
        found.append(Job(number, replace(config, verify=verify, **drafting), cancel))
    return found


def decode_mix(mix: Mix, metrics: Callable[[Metrics], None] = lambda _: None) -> Iterator[tuple[Job, Result]]:
    """Each request as its result comes; the engine's `metrics` at the end."""
    models = [None if name is None else model(name) for name in (mix.target, mix.draft)]
    coming = collections.deque(jobs(mix))
    engine = Engine(*models, replace(mix.config, kv_memory=memory(mix, coming, models) if mix.crowded else None))
    chance = random.Random(mix.seed)
    added: dict[int, Job] = {}
    updates: collections.Counter[int] = collections.Counter()
    while coming or engine.busy:
        for _ in range(mix.batch):
            if coming and chance.random() < (CROWDED_ARRIVAL if mix.crowded else ARRIVAL):
                job = coming.popleft()
                index = engine.add(prompts(mix.target)[job.number], job.config)
                added[index] = job
                if job.cancel == 0:
                    engine.cancel(index)
        for update in engine.step():
            updates[update.index] += 1
            if update.result is not None:
                yield added.pop(update.index), update.result
            elif updates[update.index] == added[update.index].cancel:
                engine.cancel(update.index)
    if added:
        raise RuntimeError(f"{mix.name}: no result of the requests {sorted(added)}")
    found = engine.metrics()
    if found.free_pages != found.pages:
        raise RuntimeError(f"{mix.name}: {found.pages - found.free_pages} pages are nobody's and not free")
    metrics(found)


def memory(mix: Mix, coming: Iterable[Job], models: list[LoadedModel | None]) -> int:
    """Bytes for the longest request and SPARE pages."""
    length, page = mix.config.block_length or models[0].block_length, mix.config.page_size
    longest = max(len(prompts(mix.target)[job.number]) + job.config.max_new_tokens for job in coming)
    each = sum(page_bytes(one, page) for one in models if one is not None)
    return (-(-aligned(longest, length) // page) + SPARE) * each


def temporal_alone(mix: Mix, job: Job) -> Result:
    """A temporal request by a call of its own."""
    prompt = prompts(mix.target)[job.number]
    return generate(model(mix.target), [prompt], model(mix.draft), job.config, max_batch=1)[0]


def mixes(quick: bool = False) -> list[Mix]:
    """Every target in every engine; few requests in one engine of each target where it has to be quick."""
    found = []
    for n, (target, block_length) in enumerate(TARGETS):
        built_in = target in BUILT_IN
        available = 100 if built_in else len(prompts(target))
        for i, (role, settings) in enumerate(ENGINES):
            if quick and i != n % len(ENGINES):
                continue
            draft = None if role is None else "tiny-draft" if built_in else f"{target}/{role}"
            seed = n * len(ENGINES) + i
            numbers = random.Random(seed).sample(range(available), 8 if quick else available)
            config = EngineConfig(block_length=block_length, **settings)
            if config.page_size == 16:
                numbers = random.Random(seed).sample(numbers[: -(-len(numbers) // AGAIN)] * AGAIN, len(numbers))
            found.append(Mix(target, draft, config, tuple(numbers), seed))
    return found
