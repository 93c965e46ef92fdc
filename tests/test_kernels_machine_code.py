"""Loops and instructions are read from machine code; the words are nvdisasm's."""

import struct
from collections import Counter

import pytest

from pallas_kernels.machine_code import Operation, count_instructions, find_loops

HIGH = 0x000FE20000000000  # without an operand's bits
FFMA, FADD, FMNMX, MUFU, LDSM, HMMA = 0x7823, 0x7221, 0x7209, 0x7308, 0x783B, 0x723C
UIADD3, EXIT = 0x7890, 0x794D


def branch(instructions, capability):
    """Returns the two words of a branch that a thread takes if P0 is true.

    The distance is a signed number of instructions, from the next one.
    """
    distance = 16 * instructions
    if capability < 90:
        low = (distance & 0xFFFFFFFF) << 32 | 0x0947
    else:
        words = distance // 4
        low = (words >> 8 & 0x3FFFFFFF) << 34 | (words & 0xFF) << 16 | 0x0947
    return low, 0x000FEA0003800000 | (0x3FFFF if distance < 0 else 0)


def assemble(*instructions):
    words = [word if isinstance(word, tuple) else (word, HIGH) for word in instructions]
    return b"".join(struct.pack("<QQ", *pair) for pair in words)


@pytest.mark.parametrize(
    "capability, low, high, length",
    [
        (86, 0xFFFFFFF000007947, 0x000FC0000383FFFF, 1),
        (86, 0xFFFFEED000007947, 0x000FEA000383FFFF, 275),
        (90, 0xFFFFFFFC00FC7947, 0x000FC0000383FFFF, 1),
        (90, 0xFFFFFFC8005C1947, 0x000FEA000383FFFF, 873),
    ],
)
def test_a_loop_begins_where_its_branch_jumps_to(capability, low, high, length):
    """nvdisasm shows these words, from compiled kernels, as branches to the loop's beginning."""
    code = assemble(
        HMMA, FADD, *([HMMA, *[FFMA] * (length - 2)] if length > 1 else []), (low, high)
    )
    loops = find_loops(code, capability)
    expected = [{"tensor": 1, "FMA": length - 2, "other": 1}] if length > 1 else []
    assert [loop.units for loop in loops] == expected


@pytest.mark.parametrize("capability", [86, 90])
def test_innermost_loops_with_products_are_found_and_counted_by_unit(capability):
    jump = lambda instructions: branch(instructions, capability)
    code = assemble(
        FADD,  # before all loops
        *(FADD, jump(-2)),  # a loop without products
        *(FFMA, LDSM, FMNMX, MUFU, HMMA, jump(2), UIADD3, FADD, jump(-9)),
        jump(-2),  # jumps to the branch above, so it is part of the loop
        *(HMMA, HMMA, jump(-3), jump(-18)),  # the second loop, and one around both
        EXIT,
    )
    first, second = find_loops(code, capability)
    assert first.units == {
        "FMA": 2, "ALU": 1, "MUFU": 1, "memory": 1, "tensor": 1, "other": 4
    }  # fmt: skip
    assert first.arithmetic == 4
    assert second.units == {"tensor": 2, "other": 1}
    assert count_instructions(code)["HMMA"] == 3 and count_instructions(code)["FADD"] == 3


@pytest.mark.parametrize("capability", [86, 90])
def test_code_behind_a_kernels_end_that_jumps_back_closes_no_loop(capability):
    """The second attempt of a wait is part of the loop that waits, wherever it lies."""
    jump = lambda instructions: branch(instructions, capability)
    low, high = jump(-6)
    always = low | 0x7000, high
    code = assemble(
        *(FADD, jump(7), FFMA),  # waits, and goes on behind the end where it must try again
        *(HMMA, FMNMX, jump(-4)),  # a loop with products, from FFMA
        *(LDSM, HMMA, EXIT),
        *(MUFU, jump(-2), always),  # tries again until it can go back to HMMA of the loop
    )
    (loop,) = find_loops(code, capability)
    assert loop.units == {"tensor": 1, "ALU": 1, "FMA": 1, "other": 1}


@pytest.mark.parametrize(
    "low, high, operation",
    [
        (0x00000000FF0B783B, 0x000E280000000000, Operation("LDSM", 4)),
        (0x00004000FF10783B, 0x000E680000000100, Operation("LDSM", 8)),
        (0x008000001750783B, 0x000E680000004200, Operation("LDSM", 16)),
        (0x012000079B547984, 0x000EE60008008A00, Operation("LDS", 8)),
        (0x0000001815007388, 0x0043E80000000C00, Operation("STS", 16)),
        (0x0000026062002986, 0x000FE2000C101506, Operation("STG", 2)),
        (0x0800000002157FAE, 0x0003E8000B901C4A, Operation("LDGSTS", 16)),
        (0x0000000010009FAE, 0x0009E2000B92184A, Operation("LDGSTS", 4)),
        (0x00000000FFFFF984, 0x000FE20000000800, Operation("")),  # its predicate is false
        (0x00000006040C723C, 0x004FDE00000010FF, Operation("HMMA", 8)),
        (0x000000786060723C, 0x082FE600000418FF, Operation("HMMA", 16)),
        (0x03E00000081879F0, 0x000FE20008701818, Operation("HGMMA", 256, reads_shared=True)),
        (0x00600000288879F0, 0x000FE2000C7018FF, Operation("HGMMA", 32, reads_shared=True)),
        (0x41E000109C587DF0, 0x000FE20008701858, Operation("HGMMA", 128)),
    ],
)
def test_sizes_of_operands_are_read(low, high, operation):
    """nvdisasm shows these words with these sizes; a lane's share of LDSM's matrices is 4 bytes."""
    code = assemble((low, high), HMMA, branch(-3, 90))
    (loop,) = find_loops(code, 90)
    assert loop.operations - Counter([Operation("HMMA", 8), Operation("")]) == Counter([operation])
