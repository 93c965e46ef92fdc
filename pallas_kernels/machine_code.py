"""Counts the instructions of a kernel's machine code, and those of its innermost loops, by unit.

An instruction has 128 bits. Its low 9 bits are the operation; the 3 bits above them tell where the
operands are (registers, constants, immediate numbers). Compute capabilities 8.0 to 9.0 share them.

Source: NVIDIA does not document the encoding; it was checked against nvdisasm of CUDA 13.
"""

import struct
from collections import Counter
from typing import NamedTuple

from pallas_kernels.control_flow import find_natural_loops

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
SET_REGISTERS = 0x1C8  # USETMAXREG, by which Hopper's warp groups trade registers
UNITS = {code: unit for unit, operations in OPERATIONS.items() for code in operations}
UNITS_OF_NAMES = {NAMES[code]: unit for code, unit in UNITS.items()}
ARITHMETIC = ("FMA", "ALU", "MUFU")
BRANCH, CALL = 0x147, 0x144  # ptxas leaves loops by calls, too
EXITS = (0x14D, 0x150)  # of the kernel, and the return of a function
BYTES = 16  # of an instruction


class Operation(NamedTuple):
    """An instruction, as far as its cost depends on it."""

    name: str
    size: int = 0  # bytes a lane moves; the columns of an HGMMA's result; the depth of an HMMA
    reads_shared: bool = False  # an HGMMA whose first operand is in shared memory, as the second


class Loop(NamedTuple):
    """The instructions of an innermost loop with tensor-core products, for one warp and turn."""

    units: Counter  # of each unit; "other" are branches, barriers and what a warp computes once
    operations: Counter = Counter()  # of each Operation; those of "other" have no name

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


WIDTHS = (1, 1, 2, 2, 4, 8, 16, 16)  # bytes a lane of a load or store, by its width's code


def _operation(low, high) -> Operation:
    """Returns the operation of an instruction; that of one that never executes has no name."""
    name = NAMES.get(low & 0x1FF, "")
    if low >> 12 & 0xF == 0xF:  # its predicate is false
        return Operation("")
    if name == "HGMMA":
        return Operation(name, 8 * (1 + (low >> 53 & 0x3F)), low >> 9 & 7 == 4)
    if name == "HMMA":
        return Operation(name, 16 if high & 0x1800 == 0x1800 else 8)
    if name in ("LDSM", "STSM"):
        return Operation(name, 4 << (high >> 8 & 3))  # 1, 2 or 4 matrices of 128 bytes
    if UNITS.get(low & 0x1FF) == "memory" and name[:2] in ("LD", "ST"):
        return Operation(name, WIDTHS[high >> 9 & 7])
    return Operation(name)


def count_instructions(code: bytes) -> Counter:
    """Returns how many instructions there are of each name in OPERATIONS."""
    names = NAMES | {SET_REGISTERS: "USETMAXREG"}
    return Counter(names[low & 0x1FF] for low, _ in _decode(code) if low & 0x1FF in names)


def count_operations(code: bytes) -> Counter:
    """Returns how many instructions there are of each Operation; the others have no name."""
    return Counter(_operation(*words) for words in _decode(code))


def find_loops(code: bytes, capability: int) -> tuple[Loop, ...]:
    """Returns the loops with tensor-core products that contain no other such loop, in order.

    Args:
        code: a kernel's machine code.
        capability: the compute capability times 10, such as 86.
    """
    instructions = _decode(code)
    units = [UNITS.get(low & 0x1FF, "other") for low, _ in instructions]
    operations = [_operation(*words) for words in instructions]
    loops = find_natural_loops(len(instructions), _jumps(instructions, capability))
    loops = [loop for loop in loops if any(units[i] == "tensor" for i in loop)]
    return tuple(
        Loop(Counter(units[i] for i in loop), Counter(operations[i] for i in loop))
        for loop in loops
        if not any(other < loop for other in loops)
    )


def _jumps(instructions, capability) -> dict[int, tuple[int, ...]]:
    """Returns the instructions that may follow each branch, call and exit.

    A branch is conditional if one of its two predicates (bits 12 and 87) is not the constant true.
    """
    jumps = {}
    for at, (low, high) in enumerate(instructions):
        operation, sometimes = low & 0x1FF, low >> 12 & 0xF != 7
        if operation in (BRANCH, CALL):
            target = _target(at, low, high, capability)
            sometimes |= operation == CALL or high >> 23 & 0xF != 7
            jumps[at] = (target, at + 1) if sometimes else (target,)
        elif operation in EXITS:
            jumps[at] = (at + 1,) if sometimes else ()
    return jumps
