"""Attention that masks documents or a window never gets tiles that spill registers with a mask."""

import dataclasses
from typing import Any

import jax
import pytest

from jaxtrain.config.model_section import ModelConfig
from jaxtrain.ops.routes import choose_routes
from pallas_kernels import kernel_choice, search_space
from pallas_kernels.kernel_choice import BenchRow, choose_body
from pallas_kernels.search_space import shortlist
from pallas_kernels.tiles import (
    MosaicAttentionTiles,
    describe_tiles,
    mosaic_tiles,
)

SPILLING = MosaicAttentionTiles(256, 64, 4, variant="folded", groups=4)
USUAL: Any = mosaic_tiles("attention", "sm_90")
SHAPE = 8, 1_024, 12, 12, 64
ON_HOPPER = "attention", "sm_90"
ROW = BenchRow(
    "attention",
    "h200",
    "bfloat16",
    SHAPE,
    jax.__version__,
    USUAL._replace(forward=SPILLING),
    0.5,
    "cudnn",
    1.0,
    "2026-11-27",
    "",
)


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """Makes ROW the only measurement, and Mosaic's bodies usable whatever the version of JAX."""
    monkeypatch.setattr(kernel_choice, "read_rows", lambda folder: [ROW])
    monkeypatch.setattr(kernel_choice, "explain_missing_mosaic", lambda: "")
    monkeypatch.setattr(search_space.mosaic, "USABLE", True)


def choose(**masks):
    return choose_body(*ON_HOPPER, "h200", "bfloat16", SHAPE, **masks)


@pytest.mark.parametrize(
    "masks",
    [{"documents": True}, {"window": 768}, {"documents": True, "window": 768}],
    ids=["documents", "window", "both"],
)
def test_a_masked_forward_replaces_measured_tiles_that_spill_and_says_so(masks):
    choice = choose(**masks)
    assert choice.faster and choice.tiles == USUAL
    assert f"forward has tiles of {describe_tiles(USUAL.forward)}" in choice.reason
    assert f"measured {describe_tiles(SPILLING)} spill" in choice.reason


@pytest.mark.parametrize(
    "kernel, tiles",
    [
        ("forward", MosaicAttentionTiles(128, 128, 2, variant="folded")),
        ("dkv", MosaicAttentionTiles(64, 128, 3, variant="turns")),
    ],
)
def test_with_heads_of_128_a_mask_rules_out_two_variants(kernel, tiles, monkeypatch):
    shape = 4, 2_048, 16, 4, 128
    row = ROW._replace(shape=shape, tiles=USUAL._replace(**{kernel: tiles}))
    monkeypatch.setattr(kernel_choice, "read_rows", lambda folder: [row])
    where = *ON_HOPPER, "h200", "bfloat16", shape
    masked, unmasked = choose_body(*where, documents=True), choose_body(*where)
    assert masked.tiles == USUAL and f"its {kernel} has tiles of" in masked.reason
    assert unmasked.tiles == row.tiles


def test_without_documents_and_windows_the_measured_tiles_are_used():
    choice = choose()
    assert choice.faster and choice.tiles == ROW.tiles and "spill" not in choice.reason


@pytest.mark.parametrize("values", [{"window": 768}, {"window": 768, "global_every": 2}])
@pytest.mark.parametrize("documents", [False, True])
def test_all_layers_of_a_model_with_windows_get_tiles_that_do_not_spill(values, documents):
    B, T, H, G, K = SHAPE
    model = ModelConfig(L=4, D=H * K, H=H, G=G, K=K)
    where = {"arch": "sm_90", "chip": ROW.chip, "seq_len": T, "sequences": B}
    route = lambda **values: choose_routes(
        dataclasses.replace(model, **values), documents, "gpu", False, **where
    )["attention"]
    assert route(**values).tiles == USUAL and "spill" in route(**values).reason
    assert route().tiles == (USUAL if documents else ROW.tiles)


@pytest.mark.parametrize(
    "K, expected",
    [
        (64, {"forward 256x64x4 folded 4 groups"}),
        (
            128,
            {
                "forward 128x128x2 folded",
                "forward 192x64x3 folded 3 groups",
                "dkv 64x128x3 turns",
            },
        ),
    ],
)
def test_the_bench_tries_no_tiles_that_spill_with_a_mask(K, expected):
    def tried(masked):
        of_shape = shortlist(*ON_HOPPER, (4, 2_048, 16, 4, K), masked)
        return {f"{kernel} {describe_tiles(tiles)}" for kernel, tiles in of_shape}

    assert tried(False) - tried(True) == expected and tried(True) < tried(False)
