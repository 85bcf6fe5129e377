"""The definition of `plan_block`: plain Python over lists, one slot after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simsd_kernels import rows
from simsd_kernels.plan_block.arguments import SIGNATURE
from simsd_kernels.plan_block.slots import Rule, Slot, State, signed, slot_of

MAX_CHILDREN = 64  # continuations of one state that are looked at, the likeliest
COPY_ALIGNMENT = 16
PEEKED = math.inf  # a score above all others


def plan_block(*arguments) -> tuple[Tensor, ...]:
    """See `api.plan_block`. Reads its arguments on the host."""
    given = SIGNATURE.named(arguments)
    batch, _, length = given["draft_tokens"].shape
    slots = [slot_of(given, b) if int(given["start"][b]) >= 0 else None for b in range(batch)]
    graphs = [_grow(slot, given["max_states"]) if slot else [] for slot in slots]
    _fit(graphs, int(given["row_budget"][0]) // length, given["logits_rows"])
    with torch.device("cpu"):  # whatever torch.set_default_device says
        laid_out = *_lay_out(graphs, given), *_ask_for_logits(graphs, given)
    return tuple(x.to(given["text"].device) for x in laid_out)


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
        proposal = slot.proposal(state)
        if proposal is not None:
            token, prob, *order, sharpness, calibration = proposal
            for chosen, likelihood in continuations(state, prob, *order, slot.rule, sharpness):
                reach = state.reach * likelihood
                for i in sorted(chosen):
                    reach *= 1.0 if calibration is None else calibration * prob[i]
                if not reach > 0:
                    continue
                tokens = tuple(token[i] if i in chosen else t for i, t in enumerate(state.tokens))
                bits = state.revealed | sum(1 << i for i in chosen)
                child = State(state.block, bits, tokens, state.step + 1, reach)
                if bits == full:  # finished: no state of it, but the next block may follow
                    if state.block >= slot.depth or state.block + 1 >= slot.blocks_left:
                        continue
                    if list(tokens) != slot.draft_tokens[state.block]:
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
    wanted = slot.peeks and slot.depth > 0 and slot.blocks_left > 1 and max_states > 1
    if wanted:
        masked = (-1,) * length
        next_block = next((s for s in taken if (s.block, s.revealed) == (1, 0)), State(1, 0, masked, 0, 0.0, cost=2))
        next_block.score = PEEKED
        taken = [taken[0], next_block, *(s for s in taken[1:] if s is not next_block)]
    return taken[:max_states]


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
            states[b, n], sets[b, n] = torch.tensor([max(t, 0) for t in state.tokens]), signed(state.revealed)
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


def _logit(p: float) -> float:
    if p <= 0 or p >= 1:
        return -1e30 if p <= 0 else 1e30
    return math.log(p / (1 - p))
