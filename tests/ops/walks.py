"""A stand-in target whose logits are a function of the state, graphs of what it would do, and its walk replayed."""

import functools
import random
import zlib

import torch

from backends import callable_of
from rules import STRATEGIES, even, rule
from simsd_kernels.verify_graph.api import DENOISED, DRAFTED

verify_graph, sample_logits, reveal = callable_of("verify_graph"), callable_of("sample_logits"), callable_of("reveal")

VOCABULARY = 30
FINISHED, HELD, TAKEN, LAST, STEP, JUDGED, ACCEPTED = range(7)  # progress
RULE = ("schedule", "steps", "strategy", "threshold", "sub_blocks")
ORDER = (
    *("target_logits", "rows", "states", "state_revealed", "block", "draft_tokens", "draft_blocks_in_rows"),
    *("proposal_depth", "start", "step", "step_map", "prob", "draw_logprob", "origin"),
    *("temperature", *RULE),
    *("top_k", "top_p", "seed", "banned"),
)
SHARED = ("target_logits", "banned")  # by all slots


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def signed(bits):
    return bits - (bits >> 63 << 64)


@functools.lru_cache(4096)
def model(number, first, bits, tokens):
    """Logits [L, V] of a block at position `first`: equal for equal states, and much alike for states of one block."""
    made = []
    for text, scale in ((f"{number} {first}", 4.0), (f"{number} {first} {bits} {tokens}", 1.0)):
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        made.append(torch.randn(len(tokens), VOCABULARY, generator=generator) * scale)
    return made[0] + made[1]


def target_rows(number, start, states, revealed, block, dtype=torch.float32):
    """(target_logits, rows): the model's logits at the masked positions of every state, the last first."""
    shape, rows, logits = states.shape, torch.full(states.shape, -1, dtype=torch.int32), []
    for b, c in (block >= 0).nonzero().flip(0).tolist():
        bits = int(revealed[b, c]) % 2**64
        tokens = tuple(t if bits >> i & 1 else -1 for i, t in enumerate(states[b, c].tolist()))
        made = model(number, int(start[b]) + int(block[b, c]) * shape[2], bits, tokens)
        for i in range(shape[2]):
            if not bits >> i & 1:
                rows[b, c, i] = len(logits)
                logits.append(made[i])
    return (torch.stack(logits) if logits else torch.zeros(0, VOCABULARY)).to(dtype), rows


def replay(made, backend):
    """The walk of each slot, step by step with `sample_logits` and `reveal`: what the op must return, as lists."""
    batch, count, length = made["states"].shape
    n_blocks, full = made["draft_tokens"].shape[1], (1 << length) - 1
    progress, sets, text = [], [], []
    for b in range(batch):
        index = {}
        for c in reversed(range(count)):
            bits = int(made["state_revealed"][b, c]) % 2**64
            shown = tuple(t if bits >> i & 1 else 0 for i, t in enumerate(made["states"][b, c].tolist()))
            index[int(made["block"][b, c]), bits, shown] = c
        draft = made["draft_tokens"][b].tolist()
        blocks = [
            [[0] * length, [0] * length, [1.0] * length, [0.0] * length, [0] * length] for _ in range(n_blocks + 2)
        ]
        known = int(made["state_revealed"][b, 0]) % 2**64
        blocks[0] = [
            [t if known >> i & 1 else 0 for i, t in enumerate(made["states"][b, 0].tolist())],
            *(made[name][b].tolist() for name in ("step_map", "prob", "draw_logprob", "origin")),
        ]
        at, last, block, step = (0 if made["block"][b, 0] >= 0 else None), -1, 0, int(made["step"][b])
        finished = held_blocks = taken = judged = accepted = 0
        while at is not None and taken < count and 0 <= step < made["steps"][b]:
            tokens, when, prob, logprob, how = blocks[block]
            masked = [i for i in range(length) if not known >> i & 1]
            drawn = draw(made, b, at, known, masked, backend)
            for i in revealed_by(made, b, known, length, step, drawn):
                tokens[i], prob[i], logprob[i] = drawn[i][0], drawn[i][1], drawn[i][-1]
                when[i], how[i] = step + 1, DENOISED if at == 0 else DRAFTED
                known |= 1 << i
                if block < made["proposal_depth"][b]:
                    judged += 1
                    accepted += tokens[i] == draft[block][i]
            last, taken, step = at, taken + 1, step + 1
            if known == full:
                held = block < made["draft_blocks_in_rows"][b] and tokens == draft[block]
                finished, held_blocks = finished + 1, held_blocks + held
                block, known, step = block + 1, 0, 0
                if not held:
                    break
            at = index.get((block, known, tuple(blocks[block][0])))
        progress.append([finished, held_blocks, taken, last, step, judged, accepted])
        sets.append(signed(known))
        text.append(blocks)
    return [progress, sets, *([[block[n] for block in blocks] for blocks in text] for n in range(5))]


def draw(made, b, c, known, masked, backend):
    """{position: (token, prob, log_odds, entropy, draw_logprob)} of the masked positions of a state."""
    length, count = made["states"].shape[2], len(masked)
    first = int(made["start"][b]) + int(made["block"][b, c]) * length

    def every(name, default, dtype):
        value = default if made[name] is None else made[name][b].item()
        return torch.full((count,), value, dtype=dtype)

    sequential = STRATEGIES[int(made["strategy"][b])] == "sequential"
    out = sample_logits(
        made["target_logits"][made["rows"][b, c, masked].long()],
        every("temperature", 0.0, torch.float32),
        every("top_k", 0, torch.int32),
        every("top_p", 1.0, torch.float32),
        every("seed", 0, torch.int64),
        ints(*(first + i for i in masked)),
        torch.full((count,), 0 if sequential else signed(known)),
        made["banned"],
        backend=backend,
    )
    return dict(zip(masked, zip(*(x.tolist() for x in (*out[:4], out.draw_logprob)), strict=True), strict=True))


def revealed_by(made, b, known, length, step, drawn):
    tokens, given = torch.zeros(1, length, dtype=torch.int64), torch.zeros(3, 1, length)
    for i, (_, *statistics, _) in drawn.items():
        given[:, 0, i] = torch.tensor(statistics)
    newly = reveal(
        *(tokens, torch.tensor([signed(known)]), tokens.int(), tokens.clone(), *given, ints(step)),
        **{name: made[name][b : b + 1] for name in RULE},
        backend="reference",
    )
    return [i for i in range(length) if int(newly) >> i & 1]


def arguments(batch=1, blocks=2, length=4, number=0, *, rules=None, draft=None, **given):
    """Every argument of verify_graph by name, in its order: the states that the target itself would come by among
    others that it would not, the current one first, and the target's logits there.

    `rules`: of each slot, or one for all, as `rule` takes it. `draft` [B, K, L] replaces the target's own
    tokens as the draft's, in the states as well.
    """
    slot = torch.ones(batch, dtype=torch.int32)
    generator = torch.Generator().manual_seed(number)
    rules = rules or (even(length, length), "low_confidence_static", 0.9)
    made = {
        "start": slot * 2 * length,
        "step": slot * 0,
        "temperature": torch.zeros(batch),
        "top_k": None,
        "top_p": None,
        "seed": torch.arange(batch),
        "banned": None,
        "proposal_depth": slot * blocks,
        "tokens": torch.randint(0, VOCABULARY, (batch, length), generator=generator),
        "known": torch.zeros(batch, dtype=torch.int64),
        "max_states": 64,
        "dtype": torch.float32,
    }
    assert not given.keys() - made.keys()
    made |= given
    tokens, known, dtype, most = (made.pop(name) for name in ("tokens", "known", "dtype", "max_states"))
    made |= rule(length, *(rules if isinstance(rules, list) else [rules] * batch))
    made |= {
        "step_map": torch.zeros(batch, length, dtype=torch.int32),
        "prob": torch.ones(batch, length),
        "draw_logprob": torch.zeros(batch, length),
        "origin": torch.zeros(batch, length, dtype=torch.int32),
    }
    forwards = blocks * max(made["steps"].tolist(), default=0)
    found, paths = native(made, tokens, known, number, dtype, forwards)
    made["draft_tokens"] = torch.zeros(batch, blocks, length, dtype=torch.int64)
    for b in range(batch):
        for k, (block, _) in enumerate(found[b][:blocks]):
            made["draft_tokens"][b, k] = torch.tensor(block)
    if draft is not None:
        made["draft_tokens"] = draft
    made |= {
        "states": torch.zeros(batch, most, length, dtype=torch.int64),
        "state_revealed": torch.zeros(batch, most, dtype=torch.int64),
        "block": torch.full((batch, most), -1, dtype=torch.int32),
        "draft_blocks_in_rows": slot * 0,
    }
    chance = random.Random(number)
    for b in range(batch):
        if made["start"][b] < 0:
            continue
        depth = min(int(made["proposal_depth"][b]), blocks)
        states = graph(chance, paths[b], known[b], tokens[b], made["draft_tokens"][b], depth, most)
        for c, (block, bits, shown) in enumerate(states):
            made["block"][b, c], made["state_revealed"][b, c] = block, signed(bits)
            made["states"][b, c] = torch.tensor(shown)
        made["draft_blocks_in_rows"][b] = max(block for block, *_ in states)
    made["target_logits"], made["rows"] = target_rows(
        number, *(made[name] for name in ("start", "states", "state_revealed", "block")), dtype
    )
    return {name: made[name] for name in ORDER}


def graph(chance, path, known, tokens, draft, depth, most):
    """At most `most` states (block, set, tokens): the current one first, then in any order those of the path, as the
    draft would fill them, and others, alike in all but one thing."""
    length, tokens, draft = len(tokens), tokens.tolist(), draft.tolist()
    root = int(known) % 2**64

    def state(block, bits):
        if block == len(draft):
            return block, 0, [0] * length
        own = root if block == 0 else 0
        filled = [tokens[i] if own >> i & 1 else draft[block][i] for i in range(length)]
        return block, bits, [token if bits >> i & 1 else 0 for i, token in enumerate(filled)]

    states = [(0, root, [token if root >> i & 1 else 0 for i, token in enumerate(tokens)])]
    visited = [one for one in path if one[0] < depth or (one[0] == depth and one[1] == 0)]
    states += [state(*one) for one in dict.fromkeys(visited) if one != (0, root)]
    for block, bits, shown in states.copy():
        match chance.choice(["token", "set", "block", "none"]):
            case "token" if bits:
                position = chance.choice([i for i in range(length) if bits >> i & 1])
                states.append((block, bits, [(t + (i == position)) % VOCABULARY for i, t in enumerate(shown)]))
            case "set" if block < depth:
                states.append(state(block, bits | 1 << chance.randrange(length)))
            case "block":
                states.append((chance.randrange(depth + 1), bits, shown))
    rest = states[1:most]
    chance.shuffle(rest)
    return [states[0], *rest]


def native(made, tokens, known, number, dtype, forwards):
    """`forwards` walks over the current state alone, each from where the last one ended. Of each slot every block by
    then, as lists of tokens and steps, the last one current; and the states on the way (block, set)."""
    batch, length = tokens.shape
    state = {name: made[name].clone() for name in ("start", "step", "step_map", "prob", "draw_logprob", "origin")}
    fixed = ("temperature", "top_k", "top_p", "seed", "banned", *RULE)
    blocks, path = [[] for _ in range(batch)], [[] for _ in range(batch)]
    idle = torch.where(made["start"] < 0, -1, 0).to(torch.int32)[:, None]
    zero = torch.zeros(batch, dtype=torch.int32)
    for forward in range(forwards + 1):
        for b in range(batch):
            path[b].append((len(blocks[b]), int(known[b]) % 2**64))
        if forward == forwards:
            break
        graph = tokens[:, None], known[:, None], idle
        logits, rows = target_rows(number, state["start"], *graph, dtype)
        out = verify_graph(
            *(logits, rows, *graph, torch.zeros(batch, 0, length, dtype=torch.int64), zero, zero),
            **state,
            **{name: made[name] for name in fixed},
        )
        slot, now = torch.arange(batch), out.progress[:, FINISHED].long()
        for b in now.nonzero().flatten().tolist():
            blocks[b].append((out.tokens[b, 0].tolist(), out.step_map[b, 0].tolist()))
        tokens, known = out.tokens[slot, now], out.revealed
        state["start"] = state["start"] + out.progress[:, FINISHED] * length
        state["step"] = out.progress[:, STEP].contiguous()
        state |= {name: getattr(out, name)[slot, now] for name in ("step_map", "prob", "draw_logprob", "origin")}
    for b in range(batch):
        blocks[b].append((tokens[b].tolist(), state["step_map"][b].tolist()))
    return blocks, path
