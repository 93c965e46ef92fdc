"""A kernel is chosen where a measurement shows that it is faster, and nowhere else."""

import json
import runpy
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.config.train_config import KernelsConfig, ModelConfig
from jaxtrain.ops.fused import KERNELS, missing_kernels
from jaxtrain.ops.routes import choose_routes
from pallas_kernels import kernel_choice, mosaic, ptxas, triton
from pallas_kernels.bench_results import as_row
from pallas_kernels.kernel_choice import OPS, choose_body, read_rows
from pallas_kernels.result_files import write_json
from pallas_kernels.search_space import candidates
from pallas_kernels.tiles import (
    TILES,
    AttentionTiles,
    DqProductTiles,
    FlashAttentionTiles,
    MosaicAttentionTiles,
    MosaicProductTiles,
    body_of,
    default_tiles,
    kernel_tiles,
    mosaic_tiles,
)


def timed(seconds, tiles=None):
    """Returns a contestant's result, as a contest's child writes it."""
    return {"median_s": seconds, "low_s": 0.0, "high_s": 9.0, "tiles": tiles}


ROUTED = {"norm": (768,), "attention": (8, 1_024, 12, 12, 64), "head": (768, 50_304)}
ROUTED |= {"gelu": (2_048,)}


def tiles_of(op):
    """Returns tiles whose types are all read from JSON: DqProductTiles has no default."""
    tiles = default_tiles(op, "sm_86")
    return tiles._replace(dq=DqProductTiles(64, 64, 4, 3)) if op == "attention" else tiles


def rows_of(seconds, tmp_path):
    """Writes the bench's file for the ops of ROUTED: kernels took `seconds`, XLA 1 s."""
    rows = []
    for op, shape in ROUTED.items():
        contest = SimpleNamespace(op=op, shape=shape, documents=False, window=0)
        results = {
            "triton": timed(seconds, tiles_of(op)),
            "xla": timed(1.0),
            "cudnn": "no",
        }
        rows.append(as_row(contest, "a40", results, jax.__version__)._asdict())
    write_json(tmp_path / f"rows{seconds}" / "a40.json", rows)
    return tmp_path / f"rows{seconds}"


@pytest.mark.parametrize("op", ROUTED)
def test_a_kernel_is_chosen_if_it_was_faster_at_a_similar_shape_on_the_same_chip(op, tmp_path):
    folder, shape = rows_of(0.5, tmp_path), ROUTED[op]
    choose = lambda shape=shape, chip="a40", dtype="bfloat16", folder=folder: choose_body(
        op, "sm_86", chip, dtype, shape, folder
    )
    assert choose().faster and choose().tiles == tiles_of(op)
    assert "0.50 times the time of xla on a40" in choose().reason
    assert choose(tuple(1.3 * size for size in shape)).faster
    assert not choose(tuple(2 * size for size in shape)).faster
    assert not choose(chip="a6000").faster
    assert not choose(dtype="float32").faster
    slower = choose(folder=rows_of(2.0, tmp_path))
    assert not slower.faster and "2.00 times the time" in slower.reason


def test_a_row_measured_with_another_jax_does_not_count(tmp_path, monkeypatch):
    folder, version = rows_of(0.5, tmp_path), jax.__version__
    monkeypatch.setattr(kernel_choice.jax, "__version__", "0.99.1")
    choice = choose_body("norm", "sm_86", "a40", "bfloat16", (768,), folder)
    assert not choice.faster
    end = f"not measured on a40 at this shape with jax 0.99.1, but with {version}"
    assert choice.reason.endswith(end)


def test_a_model_uses_the_kernels_that_were_measured_faster(tmp_path, monkeypatch):
    rows = read_rows(rows_of(0.5, tmp_path))
    monkeypatch.setattr(kernel_choice, "read_rows", lambda folder: rows)
    model = ModelConfig(L=2, D=768, H=12, G=12, K=64, F=2_048, V=50_304, mlp="gelu")
    routes = lambda chip, **values: choose_routes(
        model, True, "gpu", False, KernelsConfig(**values), arch="sm_86", chip=chip
    )
    measured = {op: route.implementation for op, route in routes("a40").items()}
    assert measured["attention"] == "flash:sm_86" and measured["norm"] == "fused:sm_86"
    assert measured["square"] == "plain"  # no row
    assert measured["gelu"] == "fused:sm_86"
    assert routes("a6000")["norm"].implementation == "plain"
    assert routes("a6000", strict=True)["norm"].implementation == "fused:sm_86"


DAMAGED = {
    "no JSON": "[{",
    "no list": "{}",
    "fields are missing": [{"op": "norm"}],
    "another op": {"op": "norms"},
    "a chip that is not in the table": {"chip": "b300"},
    "another shape": {"shape": [768, 2]},
    "a size is a text": {"shape": ["768"]},
    "a size is zero": {"shape": [0]},
    "a time is zero": {"other_s": 0},
    "a time is not a number": {"kernel_s": "fast"},
    "the version is a number": {"jax": 0.11},
    "tiles are empty": {"op": "square", "tiles": {"square": []}},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_error_names_a_damaged_file_of_rows(damage, tmp_path):
    folder, change = rows_of(0.5, tmp_path), DAMAGED[damage]
    path = folder / "a40.json"
    if isinstance(change, dict):
        change = [json.loads(path.read_text())[0] | change]
    path.write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(ValueError, match="a40.json must contain rows of the bench"):
        read_rows(folder)


def test_the_default_tiles_of_attention_follow_the_width_of_its_heads(tmp_path):
    table, rows = TILES["sm_86"], rows_of(0.5, tmp_path)
    for K, name in ((32, "attention_64"), (64, "attention_64"), (128, "attention")):
        where = "attention", "sm_86", "a40", "bfloat16", (2, 640, 6, 2, K)
        choice = choose_body(*where, rows)
        assert not choice.faster and choice.tiles == table[name]


@pytest.mark.parametrize("arch", TILES)
@pytest.mark.parametrize("op", OPS)
def test_the_search_changes_the_tiles_of_one_kernel_at_a_time(op, arch):
    for kernel, tiles in candidates(op, arch):
        as_dict = tiles if isinstance(tiles, dict) else tiles._asdict()
        default = default_tiles(op, arch)
        default = default if isinstance(default, dict) else default._asdict()
        assert as_dict.keys() == default.keys()
        assert {name for name in as_dict if as_dict[name] != default[name]} <= {kernel}


def test_chosen_kernels_that_a_program_does_not_contain_are_listed():
    model, strict = ModelConfig(qk_norm=True, mlp="gelu"), KernelsConfig(strict=True)
    fused = choose_routes(model, False, "gpu", False, strict, arch="sm_86")
    compiled = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()
    assert set(missing_kernels(fused, compiled)) == set(KERNELS)
    plain = choose_routes(model, False, "gpu", False, arch="sm_86")
    assert missing_kernels(plain, compiled) == []


def test_a_row_keeps_what_a_mosaic_body_does_otherwise(tmp_path):
    tiles = FlashAttentionTiles(
        MosaicAttentionTiles(192, 64, 3, variant="folded", groups=3),
        MosaicAttentionTiles(64, 128, 3),
        AttentionTiles(64, 64, 8, 2),
    )
    contest = SimpleNamespace(
        op="attention", shape=(8, 1_024, 12, 12, 64), documents=False, window=0
    )
    results = {"mosaic": timed(1.0, tiles), "xla": timed(2.0)}
    row = as_row(contest, "h100", results, jax.__version__)._asdict()
    write_json(tmp_path / "h100.json", [row])
    assert read_rows(tmp_path)[0].tiles == tiles
    written = json.loads((tmp_path / "h100.json").read_text())
    written[0]["tiles"][1] = [64, 128, 3, "mosaic"]  # as files before the variants have it
    (tmp_path / "old.json").write_text(json.dumps(written))
    read_rows.cache_clear()
    assert read_rows(tmp_path)[1].tiles == tiles


@pytest.fixture
def mosaic_usable(monkeypatch):
    """Lets bodies of Mosaic's be chosen whatever the versions of jax and ptxas."""
    monkeypatch.setattr("pallas_kernels.kernel_choice.explain_missing_mosaic", lambda: "")


@pytest.mark.usefixtures("mosaic_usable")
def test_a_row_that_mixes_bodies_selects_each_kernels_body(tmp_path):
    tiles = default_tiles("square", "sm_90") | {"square": MosaicProductTiles(256, 128, 64, 3)}
    results = {"mosaic": timed(1.0, tiles), "xla": timed(2.0)}
    contest = SimpleNamespace(op="square", shape=(2_048,), documents=False, window=0)
    row = as_row(contest, "h100", results, jax.__version__)
    write_json(tmp_path / "h100.json", [row._asdict()])
    choice = choose_body("square", "sm_90", "h100", "bfloat16", (2_048,), tmp_path)
    assert choice.faster and choice.tiles == tiles
    assert [body_of(t) for t in choice.tiles.values()] == ["mosaic", "triton"]
    odd = choose_body("square", "sm_90", "h100", "bfloat16", (2_050,), tmp_path)
    assert not odd.faster and "multiples of 64; got 2050" in odd.reason
    assert odd.tiles == default_tiles("square", "sm_90")


@pytest.mark.usefixtures("mosaic_usable")
def test_rows_of_bodies_for_ampere_are_read_back(tmp_path):
    shapes, rows = {"square": (2_048,), "attention": (8, 1_024, 12, 12, 64)}, []
    for op, shape in shapes.items():
        contest = SimpleNamespace(op=op, shape=shape, documents=False, window=0)
        results = {"mosaic": timed(0.5, mosaic_tiles(op, "sm_86")), "xla": timed(1.0)}
        rows.append(as_row(contest, "a40", results, jax.__version__)._asdict())
    write_json(tmp_path / "a40.json", rows)
    for op, shape in shapes.items():
        choice = choose_body(op, "sm_86", "a40", "bfloat16", shape, tmp_path)
        assert choice.faster and choice.tiles == mosaic_tiles(op, "sm_86")
        kernel = {"square": "square_sum", "attention": "forward"}[op]
        assert body_of(kernel_tiles(choice.tiles, kernel)) == "ampere"


@pytest.mark.parametrize(
    "version, faulty",
    [("12.6.85", False), ("12.8.61", True), ("12.9.41", True), ("12.9.86", False), ("13.0", False)],
)
def test_versions_of_ptxas_that_miscompile_are_refused(version, faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(ptxas.importlib.metadata, "version", lambda package: version)
    monkeypatch.setattr(ptxas, "OLDEST_JAX", (0,))
    ptxas.find_fault.cache_clear()
    try:
        tiles = default_tiles("square", "sm_90") | {"square": MosaicProductTiles(256, 128, 64, 3)}
        contest = SimpleNamespace(op="square", shape=(2_048,), documents=False, window=0)
        results = {"mosaic": timed(1.0, tiles), "xla": timed(2.0)}
        write_json(
            tmp_path / "h100.json", [as_row(contest, "h100", results, jax.__version__)._asdict()]
        )
        choice = choose_body("square", "sm_90", "h100", "bfloat16", (2_048,), tmp_path)
        assert choice.faster == (not faulty)
        assert (f"{version} miscompiles" in choice.reason) == faulty
        assert faulty == (choice.tiles == default_tiles("square", "sm_90"))
    finally:
        ptxas.find_fault.cache_clear()


def test_the_search_includes_mosaic_bodies_only_where_mosaic_is_usable():
    bodies = lambda arch: {body_of(kernel_tiles(t, k)) for k, t in candidates("square", arch)}
    assert bodies("sm_86") == ({"triton", "ampere"} if mosaic.USABLE else {"triton"})
    assert bodies("sm_90") == {"triton", "mosaic"} if mosaic.USABLE else {"triton"}


@pytest.mark.parametrize(
    "op, dtype, shape, obstacle",
    [
        ("attention", "bfloat16", (8, 512, 12, 12, 64), ""),
        ("attention", "float16", (1, 8_192, 16, 4, 128), ""),
        ("head", "bfloat16", (1_024, 50_304), ""),
        ("attention", "float32", (8, 512, 12, 12, 64), "bfloat16 or float16; got float32"),
        ("attention", "bfloat16", (8, 512, 12, 12, 32), "heads of 64 or 128; got 32"),
        ("head", "bfloat16", (768, 50_257), "multiples of 64; got 768, 50257"),
        ("attention", "bfloat16", (8, 8_191, 12, 12, 64), "a multiple of 8; got 8191"),
    ],
)
def test_mosaics_body_comes_first_on_hopper_where_no_row_decides(
    op, dtype, shape, obstacle, tmp_path
):
    choice = choose_body(op, "sm_90", "h200", dtype, shape, tmp_path)
    tiles: Any = choice.tiles
    body = {body_of(tiles["head"] if op == "head" else tiles.dq)}
    assert not choice.faster and "not measured on h200 at this shape" in choice.reason
    if obstacle or not mosaic.USABLE:
        assert body == {"triton"} and (mosaic.REASON or obstacle) in choice.reason
    else:
        assert body == {"mosaic"} and "Mosaic's, the first choice on sm_90" in choice.reason


def test_a_requested_kernel_without_a_row_says_which_body_runs_and_why():
    model = ModelConfig(attention="flash", H=12, G=12, K=64, D=768)
    where = {"arch": "sm_90", "chip": "h200", "seq_len": 8_192}
    route = choose_routes(model, False, "gpu", False, **where)["attention"]
    assert "model.attention=flash" in route.reason and "its body is" in route.reason
    assert body_of(route.tiles.forward) == ("mosaic" if mosaic.USABLE else "triton")


@pytest.mark.usefixtures("mosaic_usable")
def test_without_the_triton_backend_strict_uses_the_other_bodies_or_says_what_is_missing(
    monkeypatch,
):
    """JAX will remove it. Before, no body for Ampere is chosen that was not measured faster."""
    choose = lambda: choose_body("square", "sm_86", "a40", "bfloat16", (2_048,))
    assert [body_of(tiles) for tiles in choose().tiles.values()] == ["triton"] * 2
    monkeypatch.setattr("pallas_kernels.kernel_choice.has_triton", lambda: False)
    assert not choose().faster and "as this JAX has no Triton backend" in choose().reason
    assert [body_of(tiles) for tiles in choose().tiles.values()] == ["ampere"] * 2
    model = ModelConfig(L=2, D=768, H=12, G=12, K=64, F=2_048, V=50_304)
    routes = lambda **values: choose_routes(
        model, True, "gpu", False, KernelsConfig(**values), arch="sm_86", chip="a40"
    )
    square = routes()["square"]
    assert square.implementation == "plain" and "not measured on a40" in square.reason
    assert "Triton backend, which compiles the body of norm" in routes()["norm"].reason
    with pytest.raises(ValueError, match="compiles the body of dkv, dq"):
        routes(strict=True)


def test_a_chip_without_a_row_takes_that_of_one_with_the_same_multiprocessors(tmp_path):
    contest = SimpleNamespace(op="norm", shape=(768,), documents=False, window=0)
    write = lambda chip, seconds: write_json(
        tmp_path / f"{chip}.json",
        [
            as_row(
                contest, chip, {"triton": timed(seconds), "xla": timed(1.0)}, jax.__version__
            )._asdict()
        ],
    )
    choose = lambda: choose_body("norm", "sm_90", "h200", "bfloat16", (768,), tmp_path)
    write("h100", 0.5)
    assert choose().faster and "of xla on h100" in choose().reason
    write("h200", 2.0)
    read_rows.cache_clear()
    assert not choose().faster and "of xla on h200" in choose().reason


@pytest.mark.skipif(not mosaic.USABLE, reason=mosaic.REASON)
@pytest.mark.parametrize("heads, K, refused", [(12, 64, ""), (1, 64, ""), (3, 32, "got 96x768")])
def test_mosaics_square_takes_gram_matrices_of_any_multiple_of_64_rows(heads, K, refused):
    model = ModelConfig(L=2, D=768, H=12, G=heads, K=K, F=3_072, V=50_304, dtype="bfloat16")
    route = choose_routes(model, False, "gpu", False, arch="sm_90", chip="h100")["square"]
    assert (route.implementation == "fused:sm_90") is (not refused)
    assert refused in route.reason


def test_a_jax_without_the_triton_backend_can_import_the_kernels(monkeypatch):
    monkeypatch.delattr("jax.experimental.pallas.triton")
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    module = runpy.run_path(triton.__file__)
    with pytest.raises(ValueError, match="jax .* has no Triton backend for the kernel rows"):
        module["call"](None, name="rows", grid=(1,), out_shape=None, warps=4)
