"""The audit's budgets of instructions and of shared memory's cycles for attention's kernels."""

from collections import Counter

import pytest

pytest.importorskip("cramjam", reason='cramjam is missing: pip install "jaxtrain[offline]"')
from pallas_kernels.audit import find_faults  # noqa: E402
from pallas_kernels.audit_cases import CASES  # noqa: E402
from pallas_kernels.chip import find_chip  # noqa: E402
from pallas_kernels.cubin import Resources  # noqa: E402
from pallas_kernels.machine_code import Loop, Operation  # noqa: E402
from pallas_kernels.offline import KernelReport  # noqa: E402
from pallas_kernels.tiles import AttentionTiles, BlockTiles, MosaicAttentionTiles  # noqa: E402

GOOD = KernelReport("attention", Resources(200, 0, Counter(HMMA=64)), 128, 136, 32_768)


def broken(**resources):
    return GOOD._replace(resources=GOOD.resources._replace(**resources))


@pytest.mark.parametrize("kernel", ["forward", "dq"])
def test_attention_kernels_have_a_budget_of_arithmetic_for_each_score(kernel):
    """With 256 threads, a thread has 32 scores of a block.

    In the forward it rescales 64 elements of the sum, which do not count.
    """
    chip, tiles = find_chip("a40"), AttentionTiles(128, 64, 8, 2)
    case = next(case for case in CASES if case.kernel == kernel and case.K == 128)
    fma = 2 * 64 if kernel == "forward" else 64
    masked, unmasked = ({"FMA": fma, "ALU": n, "MUFU": 32, "memory": 90} for n in (256, 72))

    def faults(*loops):
        loops = tuple(Loop(Counter(units)) for units in loops)
        return find_faults(case, broken(loops=loops)._replace(threads=256), chip, tiles=tiles)

    assert not faults(unmasked, masked)
    assert any("11.00 arithmetic instructions a score" in fault for fault in faults(masked))
    assert any("inf arithmetic instructions a score" in fault for fault in faults())


@pytest.mark.parametrize("documents", [False, True])
def test_attentions_mosaic_bodies_have_a_budget_of_arithmetic_for_each_score(documents):
    """A thread of the two multiplying groups has 64 scores of a block; the third group copies."""
    chip, tiles = find_chip("h100"), MosaicAttentionTiles(128, 128, 2)
    names = [c for c in CASES if c.name == "flash_attention_forward" and c.window is None]
    case = next(c for c in names if ("docs" in c.shape) == documents and c.K == 128)
    resources = {"instructions": Counter(HGMMA=8, UTMALDG=3, USETMAXREG=2)}

    def faults(arithmetic):
        loops = (Loop(Counter(FMA=64 + round(64 * arithmetic))),)  # 64 rescale the sum
        report = broken(loops=loops, registers=168, **resources)._replace(threads=384)
        return find_faults(case, report, chip, "mosaic", tiles)

    most = 12.25 if documents else 6.02
    assert not faults(most)
    assert any(f"the budget is {most:g}" in fault for fault in faults(most + 0.1))


@pytest.mark.parametrize(("kernel", "K", "most"), [("dkv", 128, 31.4), ("dq", 64, 8.0)])
def test_attentions_backward_on_an_a40_has_a_ceiling_of_cycles_of_shared_memory(kernel, K, most):
    """A turn of four warps has 64 x 64 scores if a block of 128 threads computes 64 x 64."""
    tiles = AttentionTiles(64, 64, 4, 2)
    case = next(c for c in CASES if (c.kernel, c.K, c.window) == (kernel, K, None) and c.budget)

    def faults(cycles_for_32, chip="a40"):
        count = round(cycles_for_32 * 64 * 64 / 32 / 16)  # a whole LDSM takes 16 cycles of a turn
        loop = Loop(Counter(FMA=32, memory=count), Counter({Operation("LDSM", 16): count}))
        report = broken(loops=(loop,))._replace(threads=128)
        return find_faults(case, report, find_chip(chip), tiles=tiles)

    assert not faults(most - 0.2) and not faults(2 * most, chip="h100")
    assert any(f"of shared memory for 32 scores; at most {most:g}" in x for x in faults(most + 0.2))


@pytest.mark.parametrize("kernel", ["gelu", "gelu_backward"])
def test_gelu_has_a_budget_of_arithmetic_for_each_element_and_moves_16_bytes_a_thread(kernel):
    """With 256 threads, a thread has 32 elements of a block of 8 x 1,024."""
    chip, tiles = find_chip("h100"), BlockTiles(8, 1_024, 8)
    case = next(case for case in CASES if case.kernel == kernel)
    most = round(32 * case.element_budget)

    def faults(arithmetic=most, **narrow):
        operations = {Operation("FFMA"): arithmetic - 64, Operation("MUFU"): 64}
        operations |= {Operation("LDG", 16): 4, Operation("STG", 16): 4, Operation("LDS", 4): 2}
        operations |= {Operation(name, 8): count for name, count in narrow.items()}
        report = broken(registers=48, operations=Counter(operations))._replace(threads=256)
        return find_faults(case, report, chip, tiles=tiles)

    assert not faults()
    assert any(f"of a block; the budget is {case.element_budget:g}" in x for x in faults(most + 9))
    assert faults(LDG=2) == ["loads or stores less than 16 bytes a thread: 2 of 8 bytes"]
    assert faults(STG=3) == ["loads or stores less than 16 bytes a thread: 3 of 8 bytes"]
