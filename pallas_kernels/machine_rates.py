"""How fast a multiprocessor executes each kind of instruction, by compute capability.

A multiprocessor has four quadrants. Each has its own units and issues one instruction a cycle, for
the 32 lanes of a warp. Shared memory and the L1 cache serve all four quadrants.

Sources: NVIDIA, CUDA C++ Programming Guide, table "Throughput of Native Arithmetic Instructions",
for the lanes. NVIDIA GA102 whitepaper v2.1 and H100 whitepaper v1.04, for the tensor cores (128 and
512 FMAs a cycle and quadrant in 16 bits). Luo et al. 2025, https://arxiv.org/abs/2501.12084, for
wgmma: m64nNk16 takes N/2 cycles, and reads its operands from shared memory at 128 bytes a cycle.
tests/test_kernels_loop_model.py compares this table with the peaks in chip.py.
"""

from typing import NamedTuple


class Rates(NamedTuple):
    """What one multiprocessor does in a cycle."""

    tensor_fmas: int  # of 16-bit operands, with sums in float32
    lanes: dict[str, int]  # of each unit, and of the instructions that run at another rate
    shared_bytes: int = 128  # of shared memory and the L1 cache, which are the same memory

    def cycles(self, unit: str, name: str) -> float:
        """Returns how long four warps, one on each quadrant, keep a unit busy with one each."""
        return 4 * 32 / self.lanes.get(name, self.lanes[unit])


_UNITS = {"FMA": 128, "ALU": 64, "MUFU": 16, "IMAD": 64, "SHFL": 32}
RATES = {
    86: Rates(512, _UNITS | {"HADD2": 64, "HFMA2": 64}),
    90: Rates(2_048, _UNITS),
}
