"""Counts the instructions of a kernel's machine code, and those of its innermost loops, by unit.

An instruction has 128 bits. Its low 9 bits are the operation; the 3 bits above them tell where the
operands are (registers, constants, immediate numbers). Compute capabilities 8.0 to 9.0 share them.

Source: NVIDIA does not document the encoding; it was checked against nvdisasm of CUDA 13.
"""

import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

OPERATIONS = {
    "tensor": {0x03C: "HMMA", 0x1F0: "HGMMA"},  # HGMMA is by Hopper's warp groups
    "FMA": {
        0x020: "FMUL",
        0x021: "FADD",
        0x023: "FFMA",
        0x024: "IMAD",
        0x025: "IMAD",
        0x027: "IMAD",
        0x030: "HADD2",
        0x031: "HFMA2",
        0x035: "HFMA2",
    },
    "ALU": {
        0x002: "MOV",
        0x003: "P2R",
        0x005: "CS2R",
        0x007: "SEL",
        0x008: "FSEL",
        0x009: "FMNMX",
        0x00B: "FSETP",
        0x00C: "ISETP",
        0x00F: "VIMNMX3",
        0x010: "IADD3",
        0x011: "LEA",
        0x012: "LOP3",
        0x013: "IABS",
        0x016: "PRMT",
        0x017: "IMNMX",
        0x019: "SHF",
        0x01A: "SGXT",
        0x01C: "PLOP3",
        0x036: "VIADD",
        0x03E: "F2FP",
        0x045: "I2FP",
        0x048: "VIMNMX",
    },
    "MUFU": {0x105: "F2I", 0x106: "I2F", 0x108: "MUFU"},  # exp2, 1/x, and conversions
    "memory": {
        0x03B: "LDSM",
        0x044: "STSM",
        0x180: "LD",
        0x181: "LDG",
        0x182: "LDC",
        0x183: "LDL",  # load of a spilled register
        0x184: "LDS",
        0x185: "ST",
        0x186: "STG",
        0x187: "STL",  # store of a spilled register
        0x188: "STS",
        0x189: "SHFL",
        0x1AE: "LDGSTS",  # asynchronous copy to shared memory
        0x1B4: "UTMALDG",  # copy to shared memory by Hopper's tensor memory accelerator
        0x1B5: "UTMASTG",  # copy from shared memory by the same unit
    },
}
NAMES = {code: name for operations in OPERATIONS.values() for code, name in operations.items()}
UNITS = {code: unit for unit, operations in OPERATIONS.items() for code in operations}
ARITHMETIC = ("FMA", "ALU", "MUFU")
BRANCH = 0x147
BYTES = 16  # of an instruction


class Loop(NamedTuple):
    """The instructions of an innermost loop with tensor-core products, for one warp and turn."""

    units: Counter  # of each unit; "other" are branches, barriers and what a warp computes once

    @property
    def arithmetic(self) -> int:
        """The instructions that each thread computes with, not those that move data."""
        return sum(self.units[unit] for unit in ARITHMETIC)

    def __str__(self) -> str:
        return ", ".join(f"{self.units[unit]} {unit}" for unit in (*OPERATIONS, "other"))


def _decode(code):
    """Returns the words (low half, high half) of each instruction."""
    words = struct.unpack(f"<{len(code) // 8}Q", code)
    return list(zip(words[::2], words[1::2], strict=True))


def _target(at, low, high, capability):
    """Returns the index of the instruction that the branch at index `at` jumps to.

    The distance from the next instruction is signed. It is in bytes from bit 32 on; since compute
    capability 9.0 it is in units of 4 bytes, its low 8 bits from bit 16 on and the others from 34.
    """
    bits = (high & 0x3FFFF) << 32 | low >> 32
    signed = bits - (1 << 50 if bits >> 49 else 0)
    if capability >= 90:
        signed = ((signed >> 2) << 8 | (low >> 16) & 0xFF) * 4
    return at + 1 + signed // BYTES


def count_instructions(code: bytes) -> Counter:
    """Returns how many instructions there are of each name in OPERATIONS."""
    return Counter(NAMES[low & 0x1FF] for low, _ in _decode(code) if low & 0x1FF in NAMES)


def find_loops(code: bytes, capability: int) -> tuple[Loop, ...]:
    """Returns the loops with tensor-core products that contain no other such loop, in order.

    Args:
        code: a kernel's machine code.
        capability: the compute capability times 10, such as 86.
    """
    instructions = _decode(code)
    units = [UNITS.get(low & 0x1FF, "other") for low, _ in instructions]
    spans = {}  # the first instruction of a loop -> the last one
    for at, (low, high) in enumerate(instructions):
        if low & 0x1FF == BRANCH and (start := _target(at, low, high, capability)) <= at:
            if "tensor" in units[start : at + 1]:
                spans[start] = at
    return tuple(Loop(Counter(units[a : b + 1])) for a, b in _innermost(spans.items()))


def _innermost(spans: Iterable[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    spans = sorted(spans)
    contains = lambda outer, inner: outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]
    return [a for a in spans if not any(contains(a, b) for b in spans)]
