"""A kernel's body is never chosen for sizes that it cannot compute, and the reason says why."""

import jax
import pytest

from pallas_kernels import kernel_choice
from pallas_kernels.kernel_choice import BenchRow, choose_body, find_body_obstacle
from pallas_kernels.tiles import AmpereProductTiles, default_tiles, mosaic_tiles

MEASURED: dict[str, tuple] = {
    "square": (768,),
    "attention": (8, 1_024, 12, 12, 64),
    "head": (768, 50_304),
}
OTHERS = [  # arch, op, a near shape, why the measured body cannot run there
    ("sm_86", "square", (720,), "multiples of 64; got 720"),
    ("sm_90", "square", (720,), "multiples of 64; got 720"),
    ("sm_90", "head", (768, 50_257), "multiples of 64; got 768, 50257"),
    ("sm_90", "attention", (8, 1_001, 12, 12, 64), "8 tokens or a multiple of 8; got 1001"),
    ("sm_86", "attention", (8, 1_001, 12, 12, 64), ""),  # pads
    ("sm_90", "attention", (8, 1_000, 12, 12, 64), ""),
]


@pytest.mark.parametrize("arch, op, shape, obstacle", OTHERS)
def test_a_measured_body_is_not_chosen_for_a_near_shape_that_it_cannot_compute(
    arch, op, shape, obstacle, monkeypatch
):
    monkeypatch.setattr(kernel_choice, "explain_missing_mosaic", lambda: "")
    chip, tiles = {"sm_86": "a40", "sm_90": "h100"}[arch], mosaic_tiles(op, arch)
    row = BenchRow(
        op, chip, "bfloat16", MEASURED[op], jax.__version__, tiles, 0.5, "xla", 1.0, "", ""
    )
    monkeypatch.setattr(kernel_choice, "read_rows", lambda folder: [row])
    choose = lambda: choose_body(op, arch, chip, "bfloat16", shape)
    assert choose().faster == (not obstacle) and obstacle in choose().reason
    assert choose().tiles == (default_tiles(op, arch, shape) if obstacle else tiles)
    fault = "ptxas miscompiles"
    monkeypatch.setattr(kernel_choice, "explain_missing_mosaic", lambda: fault)
    assert not choose().faster and fault in choose().reason
    assert choose().tiles == default_tiles(op, arch, shape)


@pytest.mark.parametrize("arch, least", [("sm_86", 128), ("sm_90", 64)])
@pytest.mark.parametrize("matrix", [(768, 2_050), (720, 768), (32, 768)])
def test_one_matrix_that_a_body_cannot_compute_is_an_obstacle_to_square(arch, least, matrix):
    obstacle = lambda tiles, *matrices: find_body_obstacle("square", tiles, matrices)
    tiles = mosaic_tiles("square", arch)
    assert not obstacle(tiles, (768, 768), (768, 3_072), (128, 768))
    assert not obstacle(default_tiles("square", arch), matrix)
    size = "x".join(map(str, matrix))
    assert obstacle(tiles, (768, 768), matrix).endswith(f"at least {least}; got {size}")
    small = AmpereProductTiles(64, 32, 4)
    assert not obstacle({"square": small, "square_sum": small}, (64, 768))
