"""Finds the loops of a program from its jumps.

Compilers move code that rarely runs, such as the second attempt of a wait, behind a kernel's end,
from where it jumps back. So not every jump backwards closes a loop, and a loop's instructions do
not all lie between that jump and its target.

Source: natural loops, by dominators: Aho, Lam, Sethi, Ullman, Compilers (2006), section 9.6.
"""

from collections.abc import Mapping, Sequence


def find_natural_loops(count: int, jumps: Mapping[int, Sequence[int]]) -> list[set[int]]:
    """Returns the instructions of each loop. Loops that begin at one instruction count as one.

    Args:
        count: of the program's instructions.
        jumps: the instructions that may follow instruction i, where that is not only i + 1.
    """
    next_of = lambda i: jumps.get(i, (i + 1,))
    starts = {0} | {i + 1 for i in jumps} | {i for targets in jumps.values() for i in targets}
    starts = sorted(i for i in starts if 0 <= i < count)
    ends = [*starts[1:], count]
    number = {start: b for b, start in enumerate(starts)}  # basic blocks are numbered in order
    following = [[number[i] for i in next_of(end - 1) if i in number] for end in ends]
    preceding = [[] for _ in starts]
    for block, successors in enumerate(following):
        for successor in successors:
            preceding[successor].append(block)
    dominators = _dominators(following, preceding)
    loops: dict[int, set[int]] = {}  # the block where a loop begins -> its blocks
    for block, successors in enumerate(following):
        known = dominators[block]
        for head in successors:
            if known is not None and known >> head & 1:
                blocks, waiting = loops.setdefault(head, {head}), [block]
                while waiting:
                    if (b := waiting.pop()) not in blocks:
                        blocks.add(b)
                        waiting += [p for p in preceding[b] if dominators[p] is not None]
    return [
        {i for block in blocks for i in range(starts[block], ends[block])}
        for _, blocks in sorted(loops.items())
    ]


def _dominators(following, preceding) -> list[int | None]:
    """Returns each block's dominators, the blocks on every path to it, as a bit set.

    A block to which no path leads has None.
    """
    dominators: list[int | None] = [None] * len(following)
    dominators[0], waiting = 1, [*following[0]]
    while waiting:
        block = waiting.pop(0)
        common = -1
        for before in preceding[block]:
            if (known := dominators[before]) is not None:
                common &= known
        if dominators[block] != (common := common | 1 << block if block else 1):
            dominators[block] = common
            waiting += following[block]
    return dominators
