"""Reads machine code as nvdisasm prints it: basic blocks, the shortest way around a loop, and loads in flight."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import re

LABEL = re.compile(r"^(\.L_\w+):$")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?)U?P(\w+)\s+)?([A-Z][\w.]*)([^;]*);")
TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclasses.dataclass
class Block:
    """Instructions that run one after the other, by opcode; and the places of the blocks that may run next."""

    opcodes: list[str] = dataclasses.field(default_factory=list)
    next: list[int] = dataclasses.field(default_factory=list)


def blocks(text: str) -> list[Block]:
    """The blocks of one function. A call returns to the block behind it; its own instructions are not followed."""
    found, labels, jumps = [Block()], {}, {}
    falls = True  # whether the last instruction may go on to the next
    for line in text.splitlines():
        if label := LABEL.match(line.strip()):
            _begin(found, falls)
            falls = True
            labels[label[1]] = len(found) - 1
        elif parts := INSTRUCTION.search(line):
            if not falls or len(found) - 1 in jumps:
                _begin(found, falls)
            negated, predicate, opcode, operands = parts.groups()
            found[-1].opcodes.append(opcode)
            kind = opcode.split(".")[0]
            falls = kind not in ("EXIT", "RET", "BRA", "BRX") or predicate not in (None, "T") or "," in operands
            if kind in ("BRA", "CALL", "BRX", "RET", "EXIT"):
                jumps[len(found) - 1] = TARGET.findall(operands) if kind == "BRA" else []
    for place, targets in jumps.items():
        found[place].next += [labels[target] for target in targets]
    return found


def _begin(found: list[Block], falls: bool) -> None:
    if not found[-1].opcodes:
        return
    if falls:
        found[-1].next.append(len(found))
    found.append(Block())


def shortest_loop(code: list[Block], through: str, counts: dict[str, range]) -> int | None:
    """The fewest instructions from one `through` around to the same one, of the ways on which each opcode of `counts`
    comes as often as given there; None where there is no such way. Opcodes are regular expressions of how they begin.
    """
    mosts = tuple(wanted.stop - 1 for wanted in counts.values())
    own = [tuple(sum(bool(re.match(name, opcode)) for opcode in block.opcodes) for name in counts) for block in code]
    best = None
    for start in (i for i, block in enumerate(code) if any(re.match(through, opcode) for opcode in block.opcodes)):
        order = itertools.count()
        waiting = [(0, next(order), start, (0,) * len(counts))]
        seen = set()
        while waiting:
            steps, _, place, reached = heapq.heappop(waiting)
            if best is not None and steps >= best:
                break
            if (
                place == start
                and steps
                and all(n in wanted for n, wanted in zip(reached, counts.values(), strict=True))
            ):
                best = steps
                break
            if (place, reached) in seen or any(n > most for n, most in zip(reached, mosts, strict=True)):
                continue
            seen.add((place, reached))
            after = tuple(map(sum, zip(reached, own[place], strict=True)))
            for target in code[place].next:
                heapq.heappush(waiting, (steps + len(code[place].opcodes), next(order), target, after))
    return best


def loads_in_flight(text: str) -> int:
    """How many 16-byte loads from global memory come, as the code stands, before a register is used that one fills."""
    filled, loads = set(), 0
    for _, _, opcode, operands in INSTRUCTION.findall(text):
        registers = [int(number) for number in re.findall(r"\bR(\d+)", operands)]
        stores = opcode.startswith(("ST", "RED", "ATOM"))
        if not filled.isdisjoint(registers if stores else registers[1:]):
            break
        if re.match(r"LDG\.E\.([\w.]+\.)?128", opcode):
            filled |= set(range(registers[0], registers[0] + 4))
            loads += 1
    return loads
