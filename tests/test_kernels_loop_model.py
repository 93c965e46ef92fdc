"""The model of inner loops: rates of the units, cycles of instructions, and counts of tiles."""

from collections import Counter

import pytest

pytest.importorskip("cramjam", reason='cramjam is missing: pip install "jaxtrain[offline]"')
from pallas_kernels.audit_cases import CASES  # noqa: E402
from pallas_kernels.chip import CHIPS, find_chip  # noqa: E402
from pallas_kernels.cubin import Resources  # noqa: E402
from pallas_kernels.loop_model import (  # noqa: E402
    find_bounds,
    loop_cycles,
    loop_flops,
    triangle_tiles,
)
from pallas_kernels.machine_code import Loop, Operation  # noqa: E402
from pallas_kernels.machine_rates import RATES  # noqa: E402
from pallas_kernels.offline import KernelReport  # noqa: E402
from pallas_kernels.tiles import AttentionTiles, MosaicAttentionTiles, ProductTiles  # noqa: E402

MODELLED = [chip for chip in CHIPS.values() if chip.capability in RATES]


@pytest.mark.parametrize("chip", MODELLED, ids=lambda chip: chip.name)
def test_the_rates_of_a_multiprocessor_give_the_chips_peaks(chip):
    rates = RATES[chip.capability]
    tensor = 2 * rates.tensor_fmas * chip.sms * chip.tensor_clock_ghz * 1e9
    assert tensor == pytest.approx(chip.peak_flops["bfloat16"], rel=0.002)
    single = 2 * rates.lanes["FMA"] * chip.sms * chip.clock_ghz * 1e9
    assert single == pytest.approx(chip.peak_flops["float32"], rel=0.006)


def loop(**instructions):
    """Returns a loop of instructions without sizes; those of HMMA have the depth 16."""
    operations = {Operation(name, 16 * (name == "HMMA")): n for name, n in instructions.items()}
    return Loop(Counter(any=sum(instructions.values())), Counter(operations))


def test_cycles_of_an_a40():
    """A quadrant has 128 FMAs of tensor cores, 32 lanes for FFMA, 16 for ALU and 4 for MUFU."""
    work = loop(HMMA=1, MUFU=1, FFMA=3, IMAD=1, FMNMX=2, SHFL=1, BAR=1)
    work.operations[Operation("LDSM", 16)] = 2
    work.operations[Operation("LDGSTS", 16)] = 1
    cycles = loop_cycles(work, RATES[86])
    assert cycles[:4] == (16 * 8 * 16 / 128, 8, 3 + 2, 2 * 2)
    assert cycles.shared == 4 + 3 * 4 * 32 * 16 / 128  # a shuffle, and three times 512 bytes a warp
    assert cycles.operands == 0 and cycles.issue == 10
    assert cycles.overlapped == 52 and cycles.serial == 16 + 8 + 5 + 4 + 52


@pytest.mark.parametrize("columns, reads_shared", [(256, True), (64, True), (128, False)])
def test_a_product_of_a_warp_group_takes_half_a_cycle_a_column(columns, reads_shared):
    work = Loop(Counter(tensor=1), Counter({Operation("HGMMA", columns, reads_shared): 1}))
    cycles = loop_cycles(work, RATES[90], copied_bytes=1_280)
    assert loop_flops(work) == 2 * 64 * columns * 16
    assert cycles.tensor == columns / 2
    assert cycles.operands == columns / 4 + 16 * reads_shared
    assert cycles.serial == columns / 2 + 10


def test_narrow_products_wait_for_their_operands():
    work = Loop(Counter(tensor=1), Counter({Operation("HGMMA", 32, True): 1}))
    cycles = loop_cycles(work, RATES[90])
    assert cycles.tensor == 16 and cycles.serial == cycles.overlapped == 24


@pytest.mark.parametrize("window", [None, 1, 5, 6])
@pytest.mark.parametrize("length, rows, columns", [(12, 4, 4), (12, 4, 2), (12, 2, 4), (10, 4, 3)])
def test_tiles_of_a_triangle_are_counted(length, rows, columns, window):
    whole = cut = 0
    for top in range(0, length, rows):
        for left in range(0, length, columns):
            seen = [
                t - (window or length) < s <= t
                for t in range(top, min(top + rows, length))
                for s in range(left, left + columns)
            ]
            whole += all(seen)
            cut += any(seen) and not all(seen)
    assert triangle_tiles(length, rows, columns, window) == (whole, cut)


FORWARD = next(case for case in CASES if case.kernel == "forward" and case.K == 128)
# Of one of eight warps, for a tile of 128 queries and 64 keys. The copies have no size here.
PRODUCTS = {"HMMA": 128, "LDGSTS": 1}


def report(*loops, threads=256, **instructions):
    resources = Resources(128, 0, Counter(instructions), loops)
    return KernelReport("kernel", resources, threads, 1, 0)


def bounds_of(*args):
    bounds = find_bounds(*args)
    assert bounds
    return bounds


def test_bounds_of_attention_use_the_cheap_loop_for_tiles_without_a_mask():
    """At T=2048 with tiles of 128x64, 240 of 272 visits need no mask."""
    chip, tiles = find_chip("a40"), AttentionTiles(128, 64, 8, 2)
    plain, masked = loop(**PRODUCTS), loop(**PRODUCTS, FMNMX=512)
    one = bounds_of(FORWARD, report(plain), chip, tiles)
    two = bounds_of(FORWARD, report(masked, plain), chip, tiles)
    visited = 272 * 128 * 64 / (2_048 * 2_049 / 2)
    peak_s = FORWARD.flops / chip.peak_flops["bfloat16"]
    assert one.serial_s == one.overlapped_s == pytest.approx(peak_s * visited, rel=0.002)
    slowdown = (240 + 32 * (2_048 + 1_024) / 2_048) / 272
    assert two.serial_s / one.serial_s == pytest.approx(slowdown)
    assert two.overlapped_s == one.overlapped_s


def test_products_that_are_computed_twice_take_twice_as_long_but_unrolled_ones_do_not():
    chip, tiles = find_chip("a40"), AttentionTiles(128, 64, 8, 2)
    time = lambda n: bounds_of(FORWARD, report(loop(HMMA=n, LDGSTS=1)), chip, tiles).serial_s
    assert time(192) == pytest.approx(1.5 * time(128))
    assert time(256) == pytest.approx(time(128))
    assert time(64) == pytest.approx(time(128))  # two loops share the tile


def test_the_warp_group_that_copies_multiplies_nothing():
    """Two of three warp groups compute a tile, if the kernel moves registers between them."""
    chip, tiles = find_chip("h100"), MosaicAttentionTiles(128, 128, 2)
    products = Counter({Operation("HGMMA", 128, True): 8, Operation("HGMMA", 128): 8})
    work = report(Loop(Counter(tensor=16), products), threads=384, USETMAXREG=2)
    bounds = bounds_of(FORWARD, work, chip, tiles)
    visited = 136 * 128 * 128 / (2_048 * 2_049 / 2)
    least_s = FORWARD.flops / chip.peak_flops["bfloat16"] * visited
    assert bounds.overlapped_s == pytest.approx(least_s, rel=0.001)
    copied = 2 * 2 * 128 * 128 / 128 / 2  # cycles for keys and values, half of them a warp group
    assert bounds.loops[0].cycles.shared == copied


def test_a_product_takes_whole_rounds_of_the_multiprocessors():
    """78 tiles of the result keep 84 multiprocessors busy for one round, 91 for two."""
    case = next(case for case in CASES if case.name == "symmetric")
    chip, tiles = find_chip("a40"), ProductTiles(128, 128, 32, 4, 3)
    work = report(loop(HMMA=64, LDGSTS=1), threads=128)
    time = lambda M: (
        bounds_of(case._replace(sizes=(1, M, 32), hbm_bytes=0), work, chip, tiles).serial_s
    )
    assert time(13 * 128) == pytest.approx(2 * time(12 * 128))


def test_a_kernel_without_products_has_no_bounds_by_loops():
    assert find_bounds(FORWARD, report(), find_chip("a40"), AttentionTiles(128, 64, 8, 2)) is None
