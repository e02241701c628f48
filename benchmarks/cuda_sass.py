"""Loops of a CUDA kernel and what they issue, from the SASS text that nvdisasm or cuobjdump print.

A loop is a natural one: the blocks that reach a back edge without leaving through its header. Its steady path
is the way round that issues most tensor-core instructions (HMMA; where there are none, most fused
multiply-adds), then most asynchronous copies, and then the fewest instructions: what runs for a full tile
while copies are in flight, without the code of masked tiles. Loops inside a loop count once on its path.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_FUNCTION = re.compile(r"^\s*\.section\s+\.text\.([\w$.]+)|^\s*Function\s*:\s*([\w$.]+)")
_LABEL = re.compile(r"^\s*(\.L_[\w$]+):")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_GUARD = re.compile(r"^@!?U?P\w+\s+")
_TARGET = re.compile(r"`\((\.L_[\w$]+)\)|\b0x([0-9a-f]+)\b")

# Class of an instruction by the beginning of its name; the first that fits. The rest is "other".
CLASSES = (
    ("HMMA", r"[HIBDQ]?G?MMA"),
    ("MUFU", r"MUFU"),
    ("LDSM", r"LDSM"),
    ("LDGSTS", r"LDGSTS"),
    ("LDG", r"LDG\b|LD\b"),
    ("STG", r"STG|ST\b"),
    ("LDS", r"LDS"),
    ("STS", r"STS"),
    ("local", r"LDL|STL"),
    ("FFMA", r"FFMA"),
    ("FADD", r"FADD"),
    ("FMUL", r"FMUL"),
    ("FMNMX", r"FMNMX"),
    ("F2FP", r"F2FP|F2F\b|I2F|F2I"),
    ("SHFL", r"SHFL|REDUX|VOTE|MATCH"),
    ("BAR", r"BAR|WARPSYNC|DEPBAR|LDGDEPBAR|MEMBAR|ERRBAR|SYNCS|B2R"),
    ("MOV", r"MOV|IMAD\.MOV|CS2R|S2R|S2UR|R2UR|LDC|P2R|R2P"),
    ("IADD", r"IMAD\.IADD|IADD|LEA|IABS|IMNMX|VIMNMX|VIADD"),
    ("LOP", r"IMAD\.SHL|LOP|SHF|PRMT|SGXT|BMSK|POPC|FLO|BREV"),
    ("IMAD", r"IMAD"),
    ("SEL", r"SEL|FSEL|ISETP|FSETP|PLOP3|FSET|PSETP"),
    ("uniform", r"U[A-Z]"),
    ("BRA", r"BRA|BRX|JMP|EXIT|RET|CALL|BSSY|BSYNC|BREAK|NOP|NANOSLEEP|YIELD"),
)
_CLASSES = tuple((name, re.compile(pattern)) for name, pattern in CLASSES)


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str

    @property
    def opcode(self) -> str:
        """The name with its suffixes, without a guard: "HMMA.16816.F32.BF16"."""
        return _GUARD.sub("", self.text).split(None, 1)[0]

    @property
    def kind(self) -> str:
        """Its class in CLASSES, or "other"."""
        return _kind(self.opcode)


@functools.cache
def _kind(opcode: str) -> str:
    return next((name for name, pattern in _CLASSES if pattern.match(opcode)), "other")


@dataclass
class Block:
    """Instructions that run one after the other; ``successors`` are indices of blocks."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass
class Loop:
    header: int
    blocks: frozenset[int]
    depth: int = 1
    innermost: bool = True
    path: tuple[Instruction, ...] = ()
    longest: int = 0  # instructions of the longest way round, masked code included

    def count(self) -> Counter[str]:
        """Instructions of the steady path by class."""
        return Counter(item.kind for item in self.path)


@dataclass
class Function:
    name: str  # as in the object, mangled
    instructions: list[Instruction]
    labels: dict[str, int]  # label -> address

    def opcodes(self) -> Counter[str]:
        return Counter(item.opcode for item in self.instructions)

    def local_accesses(self) -> int:
        """Loads and stores of local memory: spills and arrays that are not in registers."""
        return sum(item.kind == "local" for item in self.instructions)


def functions(text: str) -> list[Function]:
    """The functions of a listing. Labels keep their addresses; nothing else of the listing is kept."""
    found: list[Function] = []
    waiting: list[str] = []  # labels whose address is the next instruction's
    inside = False
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            found.append(Function(match[1] or match[2], [], {}))
            inside = True
        elif re.match(r"^\s*\.section\s", line):
            inside = False  # data
        elif not inside:
            continue
        elif match := _LABEL.match(line):
            waiting.append(match[1])
        elif match := _LINE.match(line):
            address = int(match[1], 16)
            found[-1].labels.update((label, address) for label in waiting)
            waiting.clear()
            found[-1].instructions.append(Instruction(address, match[2]))
    return [item for item in found if item.instructions]


def _jump(item: Instruction, labels: dict[str, int]) -> tuple[int | None, bool] | None:
    """(target's address or None, whether the next instruction may follow), None for what is not a jump."""
    guarded = bool(_GUARD.match(item.text))
    name = item.opcode.split(".")[0]
    if name in ("EXIT", "RET"):
        return None, guarded
    if name not in ("BRA", "JMP", "BRX", "CALL"):
        return None
    operands = _GUARD.sub("", item.text).split(None, 1)[1]
    match = _TARGET.search(operands)
    target = None
    if match:
        target = labels.get(match[1]) if match[1] else int(match[2], 16)
    # A predicate may also stand before the target: "BRA !P2, `(.L_x_1)"; BRA.DIV jumps for diverged warps.
    # A CALL.REL.NOINC to a label of the same function is a far jump; to a subroutine it comes back.
    conditional = (
        guarded or name == "CALL" or ".DIV" in item.opcode or bool(re.match(r"!?U?P\d|UR?\d", operands))
    )
    return target, conditional


def blocks(function: Function) -> list[Block]:
    """The control flow graph; block 0 is the entry."""
    jumps = {item.address: jump for item in function.instructions if (jump := _jump(item, function.labels))}
    starts = {target for target, _ in jumps.values() if target is not None}
    found: list[Block] = []
    at: dict[int, int] = {}
    fresh = True
    for item in function.instructions:
        if fresh or item.address in starts:
            at[item.address] = len(found)
            found.append(Block())
        found[-1].instructions.append(item)
        fresh = item.address in jumps
    for index, block in enumerate(found):
        target, follows = jumps.get(block.instructions[-1].address, (None, True))
        if follows and index + 1 < len(found):
            block.successors.append(index + 1)
        if target is not None and target in at:
            block.successors.append(at[target])
    return found


def _dominators(graph: list[Block]) -> list[set[int]]:
    """For each block those on every way from the entry; empty for blocks that nothing reaches."""
    before: list[list[int]] = [[] for _ in graph]
    for index, block in enumerate(graph):
        for to in block.successors:
            before[to].append(index)
    order = _reverse_postorder(graph)
    found: list[set[int]] = [set() for _ in graph]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for index in order[1:]:
            sets = [found[at] for at in before[index] if found[at]]
            fresh = set.intersection(*sets) | {index} if sets else set()
            if fresh != found[index]:
                found[index], changed = fresh, True
    return found


def _reverse_postorder(graph: list[Block]) -> list[int]:
    seen, done = {0}, []
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(graph[0].successors))]
    while stack:
        index, successors = stack[-1]
        to = next(successors, None)
        if to is None:
            done.append(index)
            stack.pop()
        elif to not in seen:
            seen.add(to)
            stack.append((to, iter(graph[to].successors)))
    return done[::-1]


def _body(graph: list[Block], reached: Iterable[int], header: int, tails: Iterable[int]) -> frozenset[int]:
    before: dict[int, list[int]] = {}
    for index in reached:
        for to in graph[index].successors:
            before.setdefault(to, []).append(index)
    found, waiting = {header}, list(tails)
    while waiting:
        index = waiting.pop()
        if index not in found:
            found.add(index)
            waiting += before.get(index, [])
    return frozenset(found)


def loops(function: Function) -> list[Loop]:
    """The natural loops, outer ones before inner ones, with their steady paths."""
    graph = blocks(function)
    dominators = _dominators(graph)
    tails: dict[int, list[int]] = {}
    for index, block in enumerate(graph):
        for to in block.successors:
            if to in dominators[index]:
                tails.setdefault(to, []).append(index)
    order = {index: rank for rank, index in enumerate(_reverse_postorder(graph))}
    found = [Loop(header, _body(graph, order, header, ends)) for header, ends in tails.items()]
    for loop in found:
        others = [other for other in found if other is not loop]
        loop.depth = 1 + sum(loop.blocks < other.blocks for other in others)
        loop.innermost = not any(other.blocks < loop.blocks for other in others)
        _fill_path(loop, graph, order, tails[loop.header])
    return sorted(found, key=lambda loop: (graph[loop.header].instructions[0].address, loop.depth))


def _weight(block: Block) -> tuple[int, int, int, int]:
    kinds = Counter(item.kind for item in block.instructions)
    return kinds["HMMA"], kinds["FFMA"], kinds["LDGSTS"], -len(block.instructions)


def _fill_path(loop: Loop, graph: list[Block], order: dict[int, int], tails: list[int]) -> None:
    """The heaviest way from the header to a tail; edges that go back are inner loops' and are not taken."""
    best: dict[int, tuple[tuple[int, ...], int | None]] = {loop.header: (_weight(graph[loop.header]), None)}
    longest = {loop.header: len(graph[loop.header].instructions)}
    tensor = any(item.kind == "HMMA" for index in loop.blocks for item in graph[index].instructions)

    def key(weight: tuple[int, ...]) -> tuple[int, ...]:
        # Beside tensor cores multiply-adds are overhead (softmax): no reason to take a longer way.
        return (weight[0], weight[2], weight[3]) if tensor else (weight[1], weight[2], weight[3])

    for index in sorted(loop.blocks, key=order.__getitem__):
        if index not in best:
            continue
        for to in graph[index].successors:
            if to not in loop.blocks or order[to] <= order[index]:
                continue
            weight = tuple(a + b for a, b in zip(best[index][0], _weight(graph[to]), strict=True))
            if to not in best or key(weight) > key(best[to][0]):
                best[to] = (weight, index)
            longest[to] = max(longest.get(to, 0), longest[index] + len(graph[to].instructions))
    end: int | None = max((tail for tail in tails if tail in best), key=lambda tail: key(best[tail][0]))
    loop.longest = max(longest[tail] for tail in tails if tail in longest)
    way: list[int] = []
    while end is not None:
        way.append(end)
        end = best[end][1]
    loop.path = tuple(item for index in reversed(way) for item in graph[index].instructions)


def steady_loop(found: list[Loop]) -> Loop | None:
    """The loop with most HMMA on its path of those that have no such loop inside, and of equals the shortest:
    that of the tiles without masks. In a kernel without HMMA the same of FFMA, and without both the longest
    innermost one. None where there are no loops."""
    for kind in ("HMMA", "FFMA"):
        having = [loop for loop in found if loop.count()[kind]]
        deepest = [loop for loop in having if not any(other.blocks < loop.blocks for other in having)]
        if deepest:
            return max(deepest, key=lambda loop: (loop.count()[kind], -len(loop.path)))
    return max((loop for loop in found if loop.innermost), key=lambda loop: len(loop.path), default=None)
