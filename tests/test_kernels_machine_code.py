"""Loops and instructions are read from machine code; the words are nvdisasm's."""

import struct

import pytest

from pallas_kernels.machine_code import count_instructions, find_loops

HIGH = 0x000FE20000000000  # without an operand's bits
FFMA, FADD, FMNMX, MUFU, LDSM, HMMA = 0x7823, 0x7221, 0x7209, 0x7308, 0x783B, 0x723C
UIADD3, EXIT = 0x7890, 0x794D


def branch(instructions, capability):
    """Returns the two words of a branch by a signed number of instructions, from the next one."""
    distance = 16 * instructions
    if capability < 90:
        low = (distance & 0xFFFFFFFF) << 32 | 0x7947
    else:
        words = distance // 4
        low = (words >> 8 & 0x3FFFFFFF) << 34 | (words & 0xFF) << 16 | 0x7947
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
        jump(-2),  # an empty loop around the branch above
        *(HMMA, HMMA, jump(-3), jump(-18)),  # the second loop, and one around both
        EXIT,
    )
    first, second = find_loops(code, capability)
    assert first.units == {
        "FMA": 2, "ALU": 1, "MUFU": 1, "memory": 1, "tensor": 1, "other": 3
    }  # fmt: skip
    assert first.arithmetic == 4
    assert second.units == {"tensor": 2, "other": 1}
    assert count_instructions(code)["HMMA"] == 3 and count_instructions(code)["FADD"] == 3
