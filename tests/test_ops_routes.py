import dataclasses
import glob
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from jax._src import lib

import runs
from jaxtrain import WANTS_GPU
from jaxtrain.config.train_config import KernelsConfig, ModelConfig
from jaxtrain.errors import REFUSED
from jaxtrain.ops import routes as routes_module
from jaxtrain.ops.cudnn import explain_missing_cudnn
from jaxtrain.ops.routes import choose_routes, describe_routes


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_op_has_a_route_with_a_reason(platform, masked):
    for route in choose_routes(ModelConfig(), masked, platform, False).values():
        assert route.implementation and route.reason in str(route)


def test_a_gpu_runs_cudnn_attention_and_the_plain_product():
    routes = choose_routes(ModelConfig(), False, "gpu", True)
    assert routes["attention"].implementation == "cudnn"
    assert routes["dense"].implementation == "plain"


@pytest.mark.parametrize(("masked", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_fallback_is_marked_and_with_strict_an_error(masked, dtype):
    model = ModelConfig(dtype=dtype)
    route = choose_routes(model, masked, "gpu", False)["attention"]
    assert route.fallback and "FALLBACK" in str(route)
    with pytest.raises(ValueError, match="strict forbids fallbacks; got attention"):
        choose_routes(model, masked, "gpu", True)


def test_a_requested_route_that_cannot_run_is_an_error():
    with pytest.raises(ValueError, match="model.attention=cudnn must be .* needs a GPU"):
        choose_routes(ModelConfig(attention="cudnn"), False, "cpu", False)


@pytest.mark.parametrize(
    ("values", "where", "reason"),
    [
        ({"K": 20}, {"arch": "sm_90"}, "a multiple of 8, at most 256 on sm_90; got 20"),
        ({"K": 136}, {"arch": "sm_86"}, "at most 128 on sm_86; got 136"),
        ({"K": 264}, {"arch": "sm_90"}, "at most 256 on sm_90; got 264"),
        ({"G": 2}, {"arch": "sm_86", "tensor": 4}, "mesh.tensor=4 must divide model.G=2"),
        ({}, {"arch": "sm_75"}, "it needs sm_80 or later; got sm_75"),
        ({}, {"arch": "sm_90", "no_cudnn": "cuDNN cannot be loaded"}, "cuDNN cannot be loaded"),
        ({"attention_softcap": 50.0}, {}, "no soft-cap; got model.attention_softcap=50.0"),
    ],
)
def test_cudnn_is_not_chosen_where_its_compilation_would_fail(values, where, reason):
    route = choose_routes(ModelConfig(**values), False, "gpu", False, **where)["attention"]
    assert route.implementation == "reference" and route.fallback and reason in route.reason
    with pytest.raises(ValueError, match=f"model.attention=cudnn .*{reason}.*--model.attent"):
        requested = ModelConfig(**values, attention="cudnn")
        choose_routes(requested, False, "gpu", False, **where)


@pytest.mark.parametrize(("K", "arch"), [(128, "sm_86"), (256, "sm_90"), (136, "sm_120")])
def test_cudnn_is_chosen_up_to_its_widest_head(K, arch):
    route = choose_routes(ModelConfig(K=K), False, "gpu", True, arch=arch)["attention"]
    assert route.implementation == "cudnn"


def no_library():
    raise RuntimeError("libcudnn.so.9: cannot open shared object file")


@pytest.mark.parametrize(
    ("backend", "versions", "missing"),
    [
        ("gpu", None, True),
        ("gpu", SimpleNamespace(cudnn_get_version=no_library), True),
        ("gpu", SimpleNamespace(cudnn_get_version=lambda: 91_000), False),
        ("cpu", None, False),  # the program is compiled for a GPU that is not present
    ],
)
def test_a_missing_cudnn_is_found_before_a_program_is_compiled(
    backend, versions, missing, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(lib, "cuda_versions", versions)
    assert ("cuDNN cannot be loaded" in explain_missing_cudnn()) == missing


def test_a_cpu_is_a_fallback_where_a_gpu_is_wanted():
    choose = lambda strict, **where: choose_routes(ModelConfig(), False, "cpu", strict, **where)
    assert "FALLBACK" in str(choose(False, wants_gpu=True)["device"])
    with pytest.raises(ValueError, match="strict forbids.*device.*JAX_PLATFORMS=cpu allows"):
        choose(True, wants_gpu=True)
    assert "device" not in choose(True)


@pytest.mark.skipif(bool(glob.glob("/dev/nvidia[0-9]*")), reason="there is a GPU")
def test_a_cuda_plugin_wants_a_gpu_unless_the_user_has_named_the_cpu():
    pytest.importorskip("jax_cuda12_plugin", reason="no CUDA plugin: offline")
    argv = [sys.executable, "-m", "jaxtrain.train", "--config=configs/debug.py"]
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    options = {"cwd": runs.ROOT, "env": env, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*argv, "--config.strict=true"], check=False, **options)
    assert done.returncode == REFUSED and "JAX_PLATFORMS=cpu allows" in done.stderr
    assert not WANTS_GPU  # conftest.py sets JAX_PLATFORMS=cpu


@pytest.mark.parametrize(("bf16", "expected"), [(True, "cpu"), (False, "cpu_wide")])
def test_a_cpu_without_bf16_products_multiplies_in_float32(monkeypatch, bf16, expected):
    monkeypatch.setattr(routes_module, "cpu_multiplies_bf16", lambda: bf16)
    assert choose_routes(ModelConfig(), False, "cpu", False)["dense"].implementation == expected
    wide = choose_routes(ModelConfig(dtype="float32"), False, "cpu", False)["dense"]
    assert wide.implementation == "cpu"


def test_shallow_models_that_store_everything_are_unrolled_on_gpus():
    def unroll(**values):
        routes = choose_routes(ModelConfig(**values), False, "gpu", False, arch="sm_90")
        return routes["layers"].implementation

    assert unroll(L=12) == "unroll=12"
    assert unroll(L=48) == "unroll=48"
    assert unroll(L=12, remat="attention") == unroll(L=49) == "unroll=1"
    assert unroll(L=50, unroll=50) == "unroll=50"


def test_gpus_read_the_logits_once_where_no_kernel_computes_them():
    head = lambda platform: choose_routes(ModelConfig(), False, platform, False)["head"]
    assert head("gpu").implementation == "one_pass" and head("cpu").implementation == "plain"


def test_deep_models_are_scanned_and_shallow_ones_unrolled_on_cpu():
    unroll = lambda **values: choose_routes(ModelConfig(**values), False, "cpu", False)["layers"]
    assert unroll(L=4).implementation == "unroll=4"
    assert unroll(L=24).implementation == unroll(L=26).implementation == "unroll=1"
    assert unroll(L=26, unroll=13).implementation == "unroll=13"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"qk_norm": True, "position": "learned"},
        {"qk_norm": True, "nope_every": 1},
        {"qk_norm": True},
    ],
)
def test_only_a_model_with_qk_norm_and_rope_has_a_qk_rope_route(values):
    routes = choose_routes(ModelConfig(**values), False, "gpu", False, arch="sm_86")
    assert ("qk_rope" in routes) == (values == {"qk_norm": True})


def test_heads_that_devices_do_not_divide_have_no_kernel():
    where = dict(arch="sm_90", tensor=4)
    route = choose_routes(ModelConfig(qk_norm=True, G=2), False, "gpu", False, **where)["qk_rope"]
    assert route.implementation == "plain"
    assert "mesh.tensor=4 must divide model.G=2" in route.reason


@pytest.mark.parametrize(
    ("op", "values", "reason"),
    [
        ("norm", {"norm_gain": False}, "it multiplies by a gain; got model.norm_gain=false"),
        ("norm", {"norm_place": "post"}, "model.norm_place=post normalises only y"),
        ("qk_rope", {"norm_gain": False}, "it multiplies by a gain; got model.norm_gain=false"),
        ("qk_rope", {"qk_norm_gain": False}, "by a gain; got model.qk_norm_gain=false"),
        ("head", {"head_bias": True}, "it adds no bias; got model.head_bias=true"),
        (
            "head",
            {"logit_softcap": 15.0, "logit_softcap_form": "sqrt"},
            "its soft-cap is a tanh; got model.logit_softcap_form='sqrt'",
        ),
        ("qk_rope", {"qk_norm_over": "all"}, "it normalises each head; got model.qk_norm_over=all"),
    ],
)
def test_what_a_kernel_does_not_compute_excludes_it(op, values, reason):
    model, where = ModelConfig(qk_norm=True, **values), dict(arch="sm_90")
    route = choose_routes(model, False, "gpu", False, **where)[op]
    assert not route.is_fused and reason in route.reason
    with pytest.raises(ValueError, match=f"kernels.strict needs fused.*{reason}"):
        choose_routes(model, False, "gpu", False, KernelsConfig(strict=True), **where)


def test_only_a_model_whose_mlp_is_gelu_has_a_route_of_gelu_and_f_must_be_divisible():
    choose = lambda strict, **values: choose_routes(
        ModelConfig(**values), False, "gpu", False, KernelsConfig(strict=strict), arch="sm_90"
    )
    assert not any("gelu" in choose(False, mlp=form) for form in ("swiglu", "geglu", "relu2"))
    assert choose(False, mlp="gelu")["gelu"].implementation == "plain"  # not measured yet
    assert choose(True, mlp="gelu")["gelu"].implementation == "fused:sm_90"
    where = dict(arch="sm_90", tensor=4)
    route = choose_routes(ModelConfig(mlp="gelu", F=1_022), False, "gpu", False, **where)["gelu"]
    assert not route.is_fused and "mesh.tensor=4 must divide model.F=1022" in route.reason


STRICT, INTERPRET = KernelsConfig(strict=True), KernelsConfig(interpret=True)


@pytest.mark.parametrize(
    "values, where, reason",
    [
        ({}, {}, "got no GPU"),
        ({}, {"arch": "sm_75"}, "compiled for sm_86, sm_90; got sm_75"),
        ({"K": 96}, {"arch": "sm_86"}, "a power of two, at least 16; got model.K=96"),
        ({"K": 8}, {"arch": "sm_86"}, "at least 16; got model.K=8"),
        ({"dtype": "float64"}, {"arch": "sm_90"}, "got model.dtype=float64"),
        ({"attention_scale": 0.5}, {"arch": "sm_90"}, "only.*; got model.attention_scale=0.5"),
        ({"attention_softcap": 9.0}, {"arch": "sm_90"}, "only.*; got model.attention_softcap=9.0"),
        ({"G": 2}, {"arch": "sm_90", "tensor": 4}, "mesh.tensor=4 must divide model.G=2"),
    ],
)
def test_strict_kernels_raise_with_the_reason(values, where, reason):
    platform = "gpu" if where else "cpu"
    with pytest.raises(ValueError, match=f"kernels.strict needs fused attention.*{reason}"):
        choose_routes(ModelConfig(**values), False, platform, False, STRICT, **where)
    if where:
        choose_routes(ModelConfig(**values), False, platform, False, **where)  # no error
    with pytest.raises(ValueError, match=f"model.attention=flash needs.*{reason}"):
        requested = ModelConfig(**values, attention="flash")
        choose_routes(requested, False, platform, False, **where)


def test_a_soft_cap_rules_out_the_kernel_and_the_reason_is_stored_and_printed():
    def choose(**values):
        return choose_routes(ModelConfig(**values), False, "gpu", False, arch="sm_90")

    routes = choose(attention_scale=0.5)
    assert routes["attention"].implementation == "cudnn"
    reason = "no fused kernel: its scores are only q k / sqrt(K); got model.attention_scale"
    assert reason in routes["attention"].reason
    assert any(reason in text for _, text in describe_routes(routes))
    assert "no fused kernel" not in choose()["attention"].reason


@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_computes_a_window(masked):
    choose = lambda **values: choose_routes(
        ModelConfig(window=512, **values), masked, "gpu", False, arch="sm_90", seq_len=1_024
    )["attention"]
    assert choose(attention="flash").implementation == "flash:sm_90"
    assert "no fused kernel" not in choose().reason


@pytest.mark.parametrize("masked", [False, True])
def test_a_requested_kernel_is_chosen_and_named_by_its_architecture(masked):
    def implementation(kernels, **where):
        routes = choose_routes(ModelConfig(), masked, "gpu", False, kernels, **where)
        return routes["attention"].implementation

    assert implementation(STRICT, arch="sm_86") == "flash:sm_86"
    assert implementation(INTERPRET) == "flash:interpret"
    assert implementation(KernelsConfig(), arch="sm_86") != "flash:sm_86"  # not measured yet
    fused = choose_routes(ModelConfig(attention="cudnn"), masked, "cpu", False, INTERPRET)
    assert fused["attention"].implementation == "flash:interpret"


def described(platform="cpu", masked=False, kernels=None, arch="", **values):
    model, kernels = ModelConfig(qk_norm=True, **values), kernels or KernelsConfig()
    routes = choose_routes(model, masked, platform, False, kernels, arch=arch)
    return list(describe_routes(routes))


def test_usual_routes_are_described_in_one_line():
    assert described(dtype="float32") == [("routes", "all by XLA")]
    assert described(platform="gpu") == [("routes", "attention by cuDNN, all others by XLA")]


def test_a_fallback_is_described_first():
    rows = described(platform="gpu", masked=True)
    assert [name for name, _ in rows] == ["FALLBACK", "routes"]
    assert rows[0][1].startswith("attention  reference  cuDNN's cannot run")
    assert rows[1][1] == "all others by XLA"


def test_each_kernel_and_requested_route_has_a_line(monkeypatch):
    rows = described(platform="gpu", kernels=STRICT, arch="sm_86")
    fused = [text.split()[:2] for name, text in rows if name == "route"]
    assert ["norm", "fused:sm_86"] in fused and ["attention", "flash:sm_86"] in fused
    assert described(attention="reference", dtype="float32")[0][0] == "route"
    monkeypatch.setattr(routes_module, "cpu_multiplies_bf16", lambda: False)
    slow = described(dtype="bfloat16")
    assert ["dense", "cpu_wide"] in [text.split()[:2] for name, text in slow if name == "route"]


def test_a_kernel_is_not_used_for_a_micro_batch_that_it_cannot_index():
    model = ModelConfig(L=2, D=768, H=12, G=12, K=64, F=3_072, V=50_304, dtype="bfloat16")
    model = dataclasses.replace(model, mlp="gelu", norm="layer", position="learned", bias=True)
    model = dataclasses.replace(model, positions=1_024)
    choose = lambda sequences: choose_routes(
        model,
        False,
        "gpu",
        False,
        KernelsConfig(strict=True),
        arch="sm_86",
        chip="a40",
        sequences=sequences,
    )
    routes = choose(32)
    assert routes["gelu"].is_fused and routes["norm"].is_fused
    with pytest.raises(ValueError, match="fused gelu, .* 3,221,225,472 on a device. Raise --acc"):
        choose(1_024)
