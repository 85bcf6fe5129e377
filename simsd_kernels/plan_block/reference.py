"""The definition of `plan_block`: plain Python over lists, one slot after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from simsd_kernels import rows
from simsd_kernels.plan_block.arguments import SIGNATURE
from simsd_kernels.reveal.arguments import STRATEGIES
from simsd_kernels.sample_logits.reference import sample_logits

MAX_CHILDREN = 64  # continuations of one state that are looked at, the likeliest
COPY_ALIGNMENT = 16


@dataclass
class State:
    """A partial reveal of block number `block` (0: the current one) at denoising step `step`."""

    block: int
    revealed: int
    tokens: tuple[int, ...]  # -1 where masked
    step: int
    reach: float  # the draft's estimate that the target's walk visits it
    cost: int = 1  # in blocks of rows: 2 where the finished block before it has to come along
    score: float = field(default=0.0)

    def masked(self) -> list[int]:
        return [i for i in range(len(self.tokens)) if not self.revealed >> i & 1]


@dataclass
class Rule:
    """How a slot is denoised."""

    counts: list[int]  # positions to reveal at each step
    strategy: str
    threshold: float
    sub_blocks: int = 0  # set of positions at which one begins

    def open(self, masked: list[int]) -> list[int]:
        """Of masked positions those that a step before the last one may reveal."""
        later = (i for i in range(masked[0] + 1, masked[-1] + 1) if self.sub_blocks >> i & 1)
        end = next(later, masked[-1] + 1)
        return [i for i in masked if i < end]


@dataclass
class Seen:
    """What the target drew in a state of the current block that it has seen, [L] each; `pair` [L, L]."""

    revealed: int
    tokens: list[int]
    prob: list[float]
    log_odds: list[float]
    entropy: list[float]
    shift: list[float] | None
    pair: list[list[float]] | None

    def leads_to(self, state: State) -> bool:
        known = [i for i in range(len(self.tokens)) if self.revealed >> i & 1]
        return all(state.revealed >> i & 1 and state.tokens[i] == self.tokens[i] for i in known)

    def proposal(self, state: State) -> tuple[list, list, list, list]:
        more = [i for i in range(len(self.tokens)) if (state.revealed & ~self.revealed) >> i & 1]
        if self.shift is None or not more:
            return self.tokens, self.prob, self.log_odds, self.entropy
        log_odds = []
        for before, change, of_pair in zip(self.log_odds, self.shift, self.pair, strict=True):
            for j in more:
                change += of_pair[j]
            log_odds.append(_float32(before + change))
        return self.tokens, [_float32(_probability(x)) for x in log_odds], log_odds, self.entropy


@dataclass
class Slot:
    """One slot's arguments. Blocks are counted from the current one."""

    root: State
    start: int
    rule: Rule
    depth: int  # blocks that the draft has a proposal for
    blocks_left: int  # that the walk may enter
    calibration: float
    min_visit_prob: float
    draft_tokens: list[list[int]]  # [K, L], and so on
    statistics: tuple[list[list[float]], ...]  # prob, log_odds, entropy
    sharpness: list[float]
    logits: Tensor | None  # [K, L, V]
    sampling: dict[str, Tensor | None]
    seen: list[Seen] = field(default_factory=list)
    seen_sharpness: float = 0.0

    def proposal(self, state: State) -> tuple[list, list, list, list, float]:
        """token, prob, log_odds and entropy of each position, as the draft would draw them in `state`, and how far
        they are believed to tell the order."""
        nearest = max((s for s in self.seen if s.leads_to(state)), key=lambda s: s.revealed.bit_count(), default=None)
        if nearest is not None and state.block == 0:
            return *nearest.proposal(state), self.seen_sharpness
        sharpness = self.sharpness[state.block]
        if self.logits is None:
            return *(of_blocks[state.block] for of_blocks in (self.draft_tokens, *self.statistics)), sharpness
        logits, length = self.logits[state.block], len(state.tokens)
        first = self.start + state.block * length
        key = 0 if self.rule.strategy == "sequential" else _signed(state.revealed)

        def every(name: str, default: float, dtype: torch.dtype) -> Tensor:
            value = self.sampling[name]
            value = torch.tensor(default, dtype=dtype, device=logits.device) if value is None else value
            return value.expand(length)

        out = sample_logits(
            logits,
            every("temperature", 0.0, torch.float32),
            every("top_k", 0, torch.int32),
            every("top_p", 1.0, torch.float32),
            every("seed", 0, torch.int64),
            torch.arange(first, first + length, dtype=torch.int32, device=logits.device),
            torch.full((length,), key, dtype=torch.int64, device=logits.device),
            self.sampling["banned"],
        )
        return *(x.tolist() for x in out[:4]), sharpness


def plan_block(*arguments) -> tuple[Tensor, ...]:
    """See `api.plan_block`. Reads its arguments on the host."""
    given = SIGNATURE.named(arguments)
    batch, _, length = given["draft_tokens"].shape
    slots = [_slot(given, b) if int(given["start"][b]) >= 0 else None for b in range(batch)]
    graphs = [_grow(slot, given["max_states"]) if slot else [] for slot in slots]
    _fit(graphs, int(given["row_budget"][0]) // length, given["logits_rows"])
    with torch.device("cpu"):  # whatever torch.set_default_device says
        laid_out = *_lay_out(graphs, given), *_ask_for_logits(graphs, given)
    return tuple(x.to(given["text"].device) for x in laid_out)


def _slot(given: dict, b: int) -> Slot:
    _, ahead, length = given["draft_tokens"].shape

    def of_slot(name: str):
        return given[name][b].tolist()

    start, revealed = of_slot("start"), of_slot("revealed") & ((1 << length) - 1)
    known = given["text"][b, start : start + length].tolist()
    tokens = tuple(token if revealed >> i & 1 else -1 for i, token in enumerate(known))
    strategy = STRATEGIES[of_slot("strategy")]
    sub_blocks = 0 if given["sub_blocks"] is None else of_slot("sub_blocks")
    of_slots = ("temperature", "top_k", "top_p", "seed")
    return Slot(
        root=State(0, revealed, tokens, of_slot("step"), reach=1.0),
        start=start,
        rule=Rule(of_slot("schedule")[: of_slot("steps")], strategy, of_slot("threshold"), sub_blocks),
        depth=min(of_slot("proposal_depth"), ahead),
        blocks_left=min((of_slot("end") - start) // length, of_slot("draft_end")),
        calibration=of_slot("draft_calibration"),
        min_visit_prob=of_slot("min_visit_prob"),
        draft_tokens=of_slot("draft_tokens"),
        statistics=(of_slot("prob"), of_slot("log_odds"), of_slot("entropy")),
        sharpness=of_slot("order_sharpness"),
        logits=None if given["draft_logits"] is None else given["draft_logits"][b],
        sampling={name: None if given[name] is None else given[name][b] for name in of_slots}
        | {"banned": given["banned"]},
        seen=_seen(given, b, (1 << length) - 1),
        seen_sharpness=0.0 if given["seen_sharpness"] is None else of_slot("seen_sharpness"),
    )


def _seen(given: dict, b: int, full: int) -> list[Seen]:
    if given["seen_revealed"] is None:
        return []
    names = "tokens", "prob", "log_odds", "entropy"
    fields = [given[f"seen_{name}"][b].tolist() for name in names]
    sets = [revealed & full for revealed in given["seen_revealed"][b].tolist()]
    orders = [[None] * len(sets) if given[n] is None else given[n][b].tolist() for n in ("order_shift", "order_pair")]
    return [Seen(*state) for state in zip(sets, *fields, *orders, strict=True) if state[0] != full]


def _grow(slot: Slot, max_states: int) -> list[State]:
    """Best-first: the states to take, the current one first, then each time the one that the walk most probably
    visits."""
    length = len(slot.root.tokens)
    full = (1 << length) - 1
    taken: list[State] = []
    candidates: dict[tuple, State] = {}
    state = slot.root
    while True:
        taken.append(state)
        if len(taken) == max_states:
            break
        if state.block < slot.depth:
            token, prob, *order, sharpness = slot.proposal(state)
            for chosen, likelihood in continuations(state, prob, *order, slot.rule, sharpness):
                reach = state.reach * likelihood
                for i in sorted(chosen):
                    reach *= slot.calibration * prob[i]
                if not reach > 0:
                    continue
                tokens = tuple(token[i] if i in chosen else t for i, t in enumerate(state.tokens))
                bits = state.revealed | sum(1 << i for i in chosen)
                child = State(state.block, bits, tokens, state.step + 1, reach)
                if bits == full:  # finished: no state of it, but the next block may follow
                    if list(tokens) != slot.draft_tokens[state.block] or state.block + 1 >= slot.blocks_left:
                        continue
                    child = State(state.block + 1, 0, (-1,) * length, 0, reach, cost=2)
                key = child.block, child.revealed, child.tokens
                if any(key == (s.block, s.revealed, s.tokens) for s in taken):
                    continue  # what comes to a state late is not passed on
                if key in candidates:
                    candidates[key].reach += reach
                else:
                    candidates[key] = child
        if not candidates:
            break
        key, best = max(candidates.items(), key=lambda item: item[1].reach / item[1].cost)  # the first of equals
        worth = best.reach / best.cost
        if not worth >= slot.min_visit_prob or worth == 0:
            break
        # Never above its predecessor's: cutting at any score leaves a graph that the walk can enter.
        best.score = min(taken[-1].score, worth) if len(taken) > 1 else worth
        del candidates[key]
        state = best
    return taken


def continuations(
    state: State, prob: list[float], log_odds: list[float], entropy: list[float], rule: Rule, sharpness: float
) -> list[tuple[frozenset[int], float]]:
    """Sets of positions that the target may reveal next, with probabilities: the draft's own choice, and changes of it
    by one position (one for another, one more, one less), each less likely the more the draft's statistics speak
    against it."""
    masked = state.masked()
    if not 0 <= state.step < len(rule.counts) or not masked:
        return []
    if state.step == len(rule.counts) - 1:
        return [(frozenset(masked), 1.0)]
    masked = rule.open(masked)
    count = min(max(rule.counts[state.step], 0), len(masked))
    if rule.strategy == "sequential":
        return [(frozenset(masked[:count]), 1.0)] if count else []

    by_entropy = rule.strategy == "entropy_bounded"
    score = [_number(-e if by_entropy else o) for e, o in zip(entropy, log_odds, strict=True)]
    order = sorted(masked, key=lambda i: -score[i])  # stable: ties go to the lowest position
    more: dict[int, float] = {}
    less: dict[int, float] = {}
    size, swaps = count, True
    if by_entropy:
        size, total = 0, 0.0
        for i in order:
            if not total - score[i] < rule.threshold:
                break
            total -= score[i]
            size += 1
        if 0 < size < len(order):
            more[order[size]] = _weight(sharpness * (rule.threshold - (total - score[order[size]])))
        if size > 1:
            less[order[size - 1]] = _weight(sharpness * (total - rule.threshold))
        size = max(size, 1)
    elif rule.strategy == "low_confidence_dynamic":
        bar = _logit(rule.threshold)
        confident = sum(prob[i] > rule.threshold for i in masked)
        if confident >= count:
            order.sort(key=lambda i: not prob[i] > rule.threshold)
            size, swaps = confident, confident == count
            more = {i: _weight(sharpness * (score[i] - bar)) for i in order[size:]}
            if size > max(count, 1):
                less = {i: _weight(sharpness * (bar - score[i])) for i in order[:size]}
    base = frozenset(order[:size])
    weighted = [(base, 1.0)]  # where that is empty the draft would wait, which leads nowhere
    for out in range(size if swaps else 0):
        # Pairs nearer to the border between base and rest are no less likely: far ones are never among the likeliest.
        for within in range(size, min(len(order), size + MAX_CHILDREN // (size - out))):
            swapped = base - {order[out]} | {order[within]}
            weighted.append((swapped, _weight(sharpness * (score[order[within]] - score[order[out]]))))
    weighted += [(base | {i}, weight) for i, weight in more.items()]
    weighted += [(base - {i}, weight) for i, weight in less.items()]
    total = 0.0
    for _, weight in weighted:
        total += weight
    likeliest = sorted(range(len(weighted)), key=lambda n: -weighted[n][1])[:MAX_CHILDREN]
    kept = [weighted[n] for n in sorted(likeliest)]
    return [(chosen, weight / total) for chosen, weight in kept if chosen]


def _fit(graphs: list[list[State]], blocks: int, logits_rows: int) -> None:
    """Cuts the graphs, in place, to the best-scored states of the whole batch, current ones aside, that share `blocks`
    blocks of rows, and the rows of logits that the current ones leave."""
    ranked = [(-s.score, b, n, s) for b, graph in enumerate(graphs) for n, s in enumerate(graph) if n]
    logits_rows -= sum(len(graph[0].masked()) for graph in graphs if graph)
    kept = [1] * len(graphs)
    for _, b, n, state in sorted(ranked, key=lambda entry: entry[:3]):
        blocks -= state.cost
        logits_rows -= len(state.masked())
        if blocks < 0 or logits_rows < 0:
            break
        kept[b] = n + 1
    for b, graph in enumerate(graphs):
        del graph[kept[b] :]


def _lay_out(graphs: list[list[State]], given: dict) -> tuple[Tensor, ...]:
    """The graphs as rows (on the CPU): pending tokens, finished blocks as drafted, states; dead rows for the rest."""
    batch, ahead, length = given["draft_tokens"].shape
    pending, max_states, stride = given["pending"], given["max_states"], given["stride"]
    shape = (batch, pending + ahead + max_states, length)
    token = torch.zeros(shape, dtype=torch.int64)
    position, clock, born, dies = (torch.zeros(shape, dtype=torch.int32) for _ in range(4))
    kv_slot = torch.full(shape, -1, dtype=torch.int32)
    clock.fill_(-1)
    states = torch.zeros((batch, max_states, length), dtype=torch.int64)
    sets = torch.zeros((batch, max_states), dtype=torch.int64)
    block = torch.full((batch, max_states), -1, dtype=torch.int32)
    passed = torch.zeros(batch, dtype=torch.int32)
    birth, death = (torch.full((batch, given["kv_slots"]), rows.INF, dtype=torch.int32) for _ in range(2))
    index = torch.arange(length, dtype=torch.int32)

    for b, graph in enumerate(graphs):
        if not graph:
            continue
        start, kv_len = int(given["start"][b]), int(given["kv_len"][b])
        number = torch.tensor(start // length)
        committed = torch.arange(start, dtype=torch.int32)
        birth[b, :start] = committed // length * stride
        waiting = committed[kv_len:]
        row = slice(0, len(waiting))
        token[b].view(-1)[row] = given["text"][b, kv_len:start].cpu()
        position[b].view(-1)[row] = kv_slot[b].view(-1)[row] = waiting
        for out, value in zip((clock, born, dies), rows.clean_rows(waiting // length, stride), strict=True):
            out[b].view(-1)[row] = value
        for n, state in enumerate(graph):
            at = b, pending + ahead + n
            token[at] = torch.tensor([given["mask_id"] if t < 0 else t for t in state.tokens])
            position[at] = start + state.block * length + index
            kv_slot[at] = given["scratch"] + n * copy_stride(length) + index
            clock[at], born[at], dies[at] = rows.copy_rows(n, number + state.block, stride)
            states[b, n], sets[b, n] = torch.tensor([max(t, 0) for t in state.tokens]), _signed(state.revealed)
            block[b, n] = state.block
            if state.cost == 2:
                before = state.block - 1
                at = b, pending + before
                token[at] = given["draft_tokens"][b, before].cpu()
                position[at] = kv_slot[at] = start + before * length + index
                clock[at], born[at], dies[at] = rows.copy_rows(max_states, number + before, stride, clean=True)
                passed[b] = max(int(passed[b]), state.block)
    live = kv_slot >= 0
    of_slot = torch.arange(batch)[:, None, None].expand(shape)[live]
    birth[of_slot, kv_slot[live].long()], death[of_slot, kv_slot[live].long()] = born[live], dies[live]
    flat = (x.flatten(1) for x in (token, position, kv_slot, clock))
    return (*flat, birth, death, states, sets, block, passed)


def _ask_for_logits(graphs: list[list[State]], given: dict) -> tuple[Tensor, Tensor]:
    """The rows whose logits are needed, those of all current states first, and where each state finds its own."""
    batch, ahead, length = given["draft_tokens"].shape
    before, max_states = given["pending"] + ahead, given["max_states"]
    index = torch.zeros(given["logits_rows"], dtype=torch.int64)
    where = torch.full((batch, max_states, length), -1, dtype=torch.int32)
    states = [(b, n, state) for b, graph in enumerate(graphs) for n, state in enumerate(graph)]
    asked = 0
    for b, n, state in sorted(states, key=lambda entry: entry[1] > 0):
        for i in state.masked():
            index[asked] = (b * (before + max_states) + before + n) * length + i
            where[b, n, i] = asked
            asked += 1
    return index, where


def copy_stride(length: int) -> int:
    """KV slots between the starts of two states' copies of a block: a power of two, so that none straddles a
    power-of-two tile."""
    return max(COPY_ALIGNMENT, 1 << (length - 1).bit_length())


def _weight(exponent: float) -> float:
    """At most 1: nothing is likelier than what the draft would do. NaN (infinity times a sharpness of 0) is 1."""
    return math.exp(exponent) if exponent < 0 else 1.0


def _number(value: float) -> float:
    """Finite, so that differences are numbers; NaN ranks last."""
    return -1e30 if math.isnan(value) else min(max(value, -1e30), 1e30)


def _probability(log_odds: float) -> float:
    """Its inverse. Log-odds that are no number make a probability that is none."""
    return 1.0 / (1.0 + math.exp(min(-log_odds, 700.0)))


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def _logit(p: float) -> float:
    if p <= 0 or p >= 1:
        return -1e30 if p <= 0 else 1e30
    return math.log(p / (1 - p))


def _signed(bits: int) -> int:
    """A 64-bit set as the int64 that stores it."""
    return bits - (1 << 64) if bits >= 1 << 63 else bits
