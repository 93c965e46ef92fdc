"""Counts the bytes and FLOPs of each instruction of a compiled program, from the program's text.

The body of a loop counts once per trip if XLA knows the trip count, and once otherwise. A fusion
reads only the part of an operand that it slices, and writes only the part of a result that it
updates. An instruction reads an operand once, however often it is named. call_flops.py has the
FLOPs of custom calls, and what they move only in part.

Source: XLA's text form of HLO, https://openxla.org/xla/operation_semantics
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from pallas_kernels.call_flops import PALLAS, custom_call_flops, find_partly_moved

FREE = frozenset(
    ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id")
)
FUSIONS = ("fusion", "fusion-start")  # the second is asynchronous
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4}
BYTES |= {"u32": 4, "f64": 8, "s64": 8, "u64": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w-]*)\(")
_CALLED = re.compile(r"(?:body|calls|to_apply|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_WORKSPACE = re.compile(r"[su]8\[\d+\]")  # of cuBLAS and cuDNN, which need not use it


class Instruction(NamedTuple):
    """An instruction, parsed from one line of the program's text."""

    name: str
    op: str
    result: str  # its type, as XLA writes it
    operands: tuple[str, ...]
    rest: str  # its attributes
    is_root: bool


class Work(NamedTuple):
    """The bytes and FLOPs of one instruction, where a fusion is a single instruction."""

    instruction: Instruction
    times: int  # how often it runs
    hbm_bytes: int  # per run
    flops: float  # per run
    dtype: str  # operand type of its products, a key of Chip.peak_flops


def shapes_of(types: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns (element type, sizes) of each array in a type as XLA writes it."""
    return [
        (name, tuple(int(size) for size in sizes.split(",") if size))
        for name, sizes in _SHAPE.findall(types)
        if name in BYTES
    ]


def bytes_of(types: str) -> int:
    """Returns the bytes of all arrays in a type as XLA writes it."""
    return sum(BYTES[name] * math.prod(sizes) for name, sizes in shapes_of(types))


def _closing(text, start):
    """Returns the index at which the parenthesis opened at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError("an instruction's parentheses must close")


def _parse_instruction(line) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    root, name, right = match.groups()
    start = _closing(right, 0) if right.startswith("(") else 0  # past a tuple's type
    opcode = _OPCODE.search(right, start)
    if not opcode:
        return None
    opened = opcode.end() - 1
    closed = _closing(right, opened)
    operands = tuple(re.findall(r"%([\w.-]+)", right[opened:closed]))
    result = right[: opcode.start()]
    return Instruction(name, opcode[1], result, operands, right[closed + 1 :], bool(root))


SLICES = "dynamic-slice", "gather"  # instructions that read a part of their first operand
# Instructions that write a part of their first operand -> the operand with what they write.
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}


class Program:
    """A compiled module as computations, each a list of instructions."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            header = _COMPUTATION.match(line)
            if header:
                current = self.computations.setdefault(header[1], [])
                self.entry = header[1] if line.startswith("ENTRY") else self.entry
            elif current is not None and (instruction := _parse_instruction(line)):
                current.append(instruction)

    def executed(self) -> Iterator[tuple[Instruction, dict[str, str], int]]:
        """Yields (instruction, {name: type} of its possible operands, how often it runs)."""
        yield from self._walk(self.entry, 1)

    def _walk(self, name, times):
        instructions = self.computations[name]
        types = {i.name: i.result for i in instructions}
        for i in instructions:
            if i.op == "while":
                trips = int(match[1]) if (match := _TRIPS.search(i.rest)) else 1
                for called in _CALLED.findall(i.rest):
                    yield from self._walk(called, times * trips)
            elif i.op == "conditional":  # XLA does not know which branch runs, so all count
                for branches, branch in _BRANCHES.findall(i.rest):
                    for called in re.findall(r"[\w.-]+", branches or branch):
                        yield from self._walk(called, times)
            elif i.op in ("call", "async-start"):
                for called in _CALLED.findall(i.rest):
                    yield from self._walk(called, times)
            else:
                yield i, types, times

    def work(self) -> list[Work]:
        """Returns the work of every instruction that is not free."""
        return [
            Work(i, times, self._bytes(i, types), *self._flops(i, types))
            for i, types, times in self.executed()
            if i.op not in FREE and not i.op.endswith(("-done", "-update"))
        ]

    def _bytes(self, i, types):
        if i.op in SLICES:
            return 2 * bytes_of(i.result)
        if i.op in IN_PLACE:
            return sum(bytes_of(types[name]) for name in i.operands[1:]) + _written(i, types)
        if i.op in FUSIONS:
            return self._fusion_bytes(i)
        if i.op.endswith("-start"):  # the result's type contains the operands' types too
            return bytes_of(i.result)
        read = sum(bytes_of(types.get(name, "")) for name in set(i.operands))
        if i.op == "custom-call":
            return bytes_of(_WORKSPACE.sub("", i.result)) + read - _unmoved_bytes(i, types)
        return bytes_of(i.result) + read

    def _fusion_bytes(self, i):
        inside = self._called(i)
        types, total, updated = {j.name: j.result for j in inside}, 0, {}
        for j in inside:
            if j.op in IN_PLACE:
                updated[j.name] = _written(j, types)
        for j in inside:
            if j.op == "parameter":
                users = [user for user in inside if j.name in user.operands]
                if users and all(_slices(user, j.name) for user in users):
                    total += sum(bytes_of(u.result) for u in users if u.op in SLICES)
                else:
                    total += bytes_of(j.result)
            if j.is_root:
                results = j.operands if j.op == "tuple" else (j.name,)
                total += sum(updated.get(name, bytes_of(types[name])) for name in results)
        return total

    def _called(self, i) -> list[Instruction]:
        """Returns the instructions inside a fusion."""
        match = _CALLED.search(i.rest)
        assert match, f"{i.name} calls no computation"
        return self.computations[match[1]]

    def _flops(self, i, types):
        """Returns (FLOPs of an instruction's products, the type of their operands)."""
        if i.op in PRODUCTS:
            return PRODUCTS[i.op](i, types)
        if i.op in FUSIONS:
            inside = self._called(i)
            types = {j.name: j.result for j in inside}
            found = [PRODUCTS[j.op](j, types) for j in inside if j.op in PRODUCTS]
            dtypes = [dtype for flops, dtype in found if flops]
            return sum(flops for flops, _ in found), dtypes[0] if dtypes else "bfloat16"
        return 0.0, "bfloat16"


def _written(i, types) -> int:
    """Returns the bytes that an instruction of IN_PLACE writes."""
    return bytes_of(types[i.operands[IN_PLACE[i.op]]])


def _slices(user, name) -> bool:
    """Returns whether an instruction reads a part of `name`, or writes one into it."""
    return user.op in (*SLICES, *IN_PLACE) and user.operands[0] == name


def _dot_flops(i, types):
    left, sizes = shapes_of(types[i.operands[0]])[0]
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
    assert match, f"{i.name} names no contracted dimensions"
    depth = math.prod(sizes[int(dim)] for dim in match[1].split(",") if dim)
    flops = 2 * depth * math.prod(shapes_of(i.result)[0][1])
    return flops, _peak_of(left, i)


def _peak_of(operand, i) -> str:
    """Returns the type whose peak limits a product: a key of Chip.peak_flops."""
    if operand in ("bf16", "f16"):
        return "bfloat16"
    # XLA multiplies float32 in TF32 unless the precision is "highest", our kernels in float32.
    exact = "highest" in i.rest.lower() or any(target in i.rest for target in PALLAS)
    return "float32" if exact else "tf32"


def _call_arrays(i, types):
    """Returns the (element type, sizes) of each operand of a custom call, and of each result."""
    arrays = [shapes_of(types.get(name, "")) for name in i.operands]
    return [a[0] for a in arrays if a], shapes_of(i.result)


def _call_flops(i, types):
    operands, results = _call_arrays(i, types)
    flops = custom_call_flops(i.rest, *([size for _, size in x] for x in (operands, results)))
    return flops, _peak_of(operands[0][0], i) if flops else "bfloat16"


def _unmoved_bytes(i, types):
    """Returns the bytes of the array that a custom call moves only in part, without that part."""
    operands, results = _call_arrays(i, types)
    part = find_partly_moved(i.rest, *([size for _, size in x] for x in (operands, results)))
    if part is None:
        return 0
    dtype, sizes = [*operands, *results][part.index]
    return BYTES[dtype] * (math.prod(sizes) - part.elements)


PRODUCTS = {"dot": _dot_flops, "custom-call": _call_flops}  # opcode -> its FLOPs and their type
