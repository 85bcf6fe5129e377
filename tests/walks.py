"""A stand-in target whose logits are a function of the state, graphs of what it would do, and its walk replayed."""

import functools
import zlib

import torch

import simsd_kernels
from simsd_kernels.block_verify.graph_api import DENOISED, DRAFTED
from simsd_kernels.plan_block.api import copy_stride

VOCABULARY = 30
FINISHED, COMMITTED, TAKEN, LAST, STEP, JUDGED, ACCEPTED = range(7)  # progress


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
    """(target_logits, rows): the model's logits at the masked positions of every copy, in shuffled order."""
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
    """The walk of each lane, step by step with `sample_logits` and `reveal`: what the op must return, as lists."""
    batch, copies, length = made["states"].shape
    ahead, full = made["clean"].shape[1], (1 << length) - 1
    steps = made["schedule"].numel()
    progress, sets, text = [], [], []
    for b in range(batch):
        index = {}
        for c in reversed(range(copies)):
            bits = int(made["revealed"][b, c]) % 2**64
            shown = tuple(t if bits >> i & 1 else 0 for i, t in enumerate(made["states"][b, c].tolist()))
            index[int(made["block"][b, c]), bits, shown] = c
        clean = made["clean"][b].tolist()
        blocks = [[[0] * length, [0] * length, [1.0] * length, [0] * length] for _ in range(ahead + 2)]
        known = int(made["revealed"][b, 0]) % 2**64
        blocks[0] = [
            [t if known >> i & 1 else 0 for i, t in enumerate(made["states"][b, 0].tolist())],
            *(made[name][b].tolist() for name in ("step_map", "prob", "origin")),
        ]
        at, last, block, step = (0 if made["block"][b, 0] >= 0 else None), -1, 0, int(made["step"][b])
        finished = committed = taken = judged = accepted = 0
        while at is not None and taken < copies and 0 <= step < steps:
            tokens, when, prob, how = blocks[block]
            masked = [i for i in range(length) if not known >> i & 1]
            drawn = draw(made, b, at, known, masked, backend)
            for i in reveal(made, known, length, step, drawn):
                tokens[i], prob[i] = drawn[i][0], drawn[i][1]
                when[i], how[i] = step + 1, DENOISED if at == 0 else DRAFTED
                known |= 1 << i
                if block < made["depth"][b]:
                    judged += 1
                    accepted += tokens[i] == clean[block][i]
            last, taken, step = at, taken + 1, step + 1
            if known == full:
                held = block < made["cleaned"][b] and tokens == clean[block]
                finished, committed = finished + 1, committed + held
                block, known, step = block + 1, 0, 0
                if not held:
                    break
            at = index.get((block, known, tuple(blocks[block][0])))
        progress.append([finished, committed, taken, last, step, judged, accepted])
        sets.append(signed(known))
        text.append(blocks)
    return [progress, sets, *([[block[n] for block in blocks] for blocks in text] for n in range(4))]


def draw(made, b, c, known, masked, backend):
    """{position: (token, prob, log_odds, entropy)} of the masked positions of a copy."""
    length, count = made["states"].shape[2], len(masked)
    first = int(made["start"][b]) + int(made["block"][b, c]) * length

    def every(name, default, dtype):
        value = default if made[name] is None else made[name][b].item()
        return torch.full((count,), value, dtype=dtype)

    out = simsd_kernels.sample_logits(
        made["target_logits"][made["rows"][b, c, masked].long()],
        every("temperature", 0.0, torch.float32),
        every("top_k", 0, torch.int32),
        every("top_p", 1.0, torch.float32),
        every("seed", 0, torch.int64),
        ints(*(first + i for i in masked)),
        torch.full((count,), 0 if made["strategy"] == "sequential" else signed(known)),
        made["banned_ids"],
        backend=backend,
    )
    return dict(zip(masked, zip(*(x.tolist() for x in out[:4]), strict=True), strict=True))


def reveal(made, known, length, step, drawn):
    tokens, given = torch.zeros(1, length, dtype=torch.int64), torch.zeros(3, 1, length)
    for i, (_, *statistics) in drawn.items():
        given[:, 0, i] = torch.tensor(statistics)
    newly = simsd_kernels.reveal(
        *(tokens, torch.tensor([signed(known)]), tokens.int(), tokens.clone(), *given, ints(step)),
        *(made["schedule"], made["strategy"], made["threshold"]),
        backend="reference",
    )
    return [i for i in range(length) if int(newly) >> i & 1]


def arguments(batch=1, ahead=2, length=4, steps=None, number=0, draft=None, **given):
    """Every argument of block_verify.graph by name, in its order: plan_block's graph of what the target would do, with
    the target's logits.

    `draft` [B, K, L] replaces the target's own tokens as the draft's. `from_logits` draws the states' tokens from what
    the target says of empty blocks.
    """
    steps = length if steps is None else steps
    lane = torch.ones(batch, dtype=torch.int32)
    generator = torch.Generator().manual_seed(number)
    made = {
        "start": lane * 2 * length,
        "step": lane * 0,
        "temperature": torch.zeros(batch),
        "top_k": None,
        "top_p": None,
        "seed": torch.arange(batch),
        "banned_ids": None,
        "schedule": torch.tensor([length // steps + (s < length % steps) for s in range(steps)], dtype=torch.int32),
        "strategy": "low_confidence_static",
        "threshold": 0.9,
        "depth": lane * ahead,
        "cleaned": lane * 0,
        "clean": torch.zeros(batch, ahead, length, dtype=torch.int64),
        "tokens": torch.randint(0, VOCABULARY, (batch, length), generator=generator),
        "known": torch.zeros(batch, dtype=torch.int64),
        "max_copies": 64,
        "dtype": torch.float32,
        "from_logits": False,
    }
    assert not given.keys() - made.keys()
    made |= given
    tokens, known, dtype, copies = (made.pop(name) for name in ("tokens", "known", "dtype", "max_copies"))
    from_logits = made.pop("from_logits")
    made |= {
        "step_map": torch.zeros(batch, length, dtype=torch.int32),
        "prob": torch.ones(batch, length),
        "origin": torch.zeros(batch, length, dtype=torch.int32),
    }
    made["clean"] = own(made, tokens, known, number, dtype) if draft is None else draft
    empty = ((int(made["start"][b]) + k * length, 0, (-1,) * length) for b in range(batch) for k in range(ahead))
    logits = torch.cat([model(number, *state) for state in empty] or [torch.zeros(0, VOCABULARY)])
    logits = logits.view(batch, ahead, length, VOCABULARY)
    prob = logits.softmax(3).amax(3)
    sampling = [made[name] for name in ("temperature", "top_k", "top_p", "seed", "banned_ids")]
    plan = simsd_kernels.plan_block(
        *(tokens, known, made["start"], made["step"], lane * (ahead + 1), made["clean"], made["depth"]),
        *(prob, torch.logit(prob, eps=1e-6), prob * 0, lane.float(), prob[:, :, 0] * 0 + 0.3),
        *(logits if from_logits else None, *sampling),
        schedule=made["schedule"], strategy=made["strategy"], threshold=made["threshold"], floor=0.0,
        mask_id=VOCABULARY, max_copies=copies, max_rows=10**6, scratch=256,
        slots=256 + copies * copy_stride(length), stride=copies + 3,
    )  # fmt: skip
    made |= {"states": plan.states, "revealed": plan.revealed, "block": plan.block, "cleaned": plan.cleaned}
    made["target_logits"], made["rows"] = target_rows(
        number, made["start"], plan.states, plan.revealed, plan.block, dtype
    )
    return {name: made[name] for name in ORDER}


ORDER = (
    *("target_logits", "rows", "states", "revealed", "block", "clean", "cleaned", "depth", "start", "step", "step_map"),
    *("prob", "origin", "temperature", "top_k", "top_p", "seed", "banned_ids", "schedule", "strategy", "threshold"),
)


def native(made, tokens, known, number, dtype, forwards):
    """`forwards` walks over the current state alone, each from where the last one ended: every block by then, [B, n, L]
    lists of tokens and steps, the last one current."""
    batch, _, length = made["clean"].shape
    state = {name: made[name].clone() for name in ("start", "step", "step_map", "prob", "origin")}
    fixed = ("temperature", "top_k", "top_p", "seed", "banned_ids", "schedule", "strategy", "threshold")
    blocks = [[] for _ in range(batch)]
    idle = torch.where(made["start"] < 0, -1, 0).to(torch.int32)[:, None]
    zero = torch.zeros(batch, dtype=torch.int32)
    for _ in range(forwards):
        graph = tokens[:, None], known[:, None], idle
        logits, rows = target_rows(number, state["start"], *graph, dtype)
        out = simsd_kernels.block_verify_graph(
            *(logits, rows, *graph, torch.zeros(batch, 0, length, dtype=torch.int64), zero, zero),
            **state,
            **{name: made[name] for name in fixed},
        )
        lane, now = torch.arange(batch), out.progress[:, FINISHED].long()
        for b in now.nonzero().flatten().tolist():
            blocks[b].append((out.tokens[b, 0].tolist(), out.step_map[b, 0].tolist()))
        tokens, known = out.tokens[lane, now], out.revealed
        state["start"] = state["start"] + out.progress[:, FINISHED] * length
        state["step"] = out.progress[:, STEP].contiguous()
        state |= {name: getattr(out, name)[lane, now] for name in ("step_map", "prob", "origin")}
    for b in range(batch):
        blocks[b].append((tokens[b].tolist(), state["step_map"][b].tolist()))
    return blocks


def own(made, tokens, known, number, dtype):
    """[B, K, L]: the blocks that the target itself goes on to decode."""
    batch, ahead, length = made["clean"].shape
    steps = made["schedule"].numel()
    blocks = native(made, tokens, known, number, dtype, ahead * steps) if ahead else [[]] * batch
    clean = torch.zeros(batch, ahead, length, dtype=torch.int64)
    for b, found in enumerate(blocks):
        for k, (block, _) in enumerate(found[:ahead]):
            clean[b, k] = torch.tensor(block)
    return clean
