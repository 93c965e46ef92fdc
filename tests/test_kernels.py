import pytest

from jaxtrain import kernels
from jaxtrain.config import ModelConfig
from jaxtrain.kernels import choose_routes


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_op_has_a_route_with_a_reason(platform, masked):
    for route in choose_routes(ModelConfig(), masked, platform, False).values():
        assert route.implementation and route.reason in str(route)


def test_a_gpu_takes_flash_attention_and_the_plain_product():
    routes = choose_routes(ModelConfig(), False, "gpu", True)
    assert routes["attention"].implementation == "cudnn"
    assert routes["dense"].implementation == "plain"


@pytest.mark.parametrize(("masked", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_fallback_says_so_and_strict_makes_it_an_error(masked, dtype):
    model = ModelConfig(dtype=dtype)
    route = choose_routes(model, masked, "gpu", False)["attention"]
    assert route.fallback and "FALLBACK" in str(route)
    with pytest.raises(ValueError, match="strict forbids fallbacks; got attention"):
        choose_routes(model, masked, "gpu", True)


def test_an_explicit_route_that_cannot_be_served_raises():
    with pytest.raises(ValueError, match="model.attention=cudnn needs a GPU"):
        choose_routes(ModelConfig(attention="cudnn"), False, "cpu", False)


@pytest.mark.parametrize(("has", "expected"), [(True, "cpu"), (False, "cpu_wide")])
def test_a_cpu_without_bf16_products_multiplies_in_float32(monkeypatch, has, expected):
    monkeypatch.setattr(kernels, "cpu_multiplies_bf16", lambda: has)
    assert choose_routes(ModelConfig(), False, "cpu", False)["dense"].implementation == expected
    wide = choose_routes(ModelConfig(dtype="float32"), False, "cpu", False)["dense"]
    assert wide.implementation == "cpu"


def test_deep_models_are_scanned_and_shallow_ones_unrolled_on_cpu():
    unroll = lambda **values: choose_routes(ModelConfig(**values), False, "cpu", False)["layers"]
    assert unroll(L=4).implementation == "unroll=4"
    assert unroll(L=26).implementation == "unroll=1"
    assert unroll(L=26, unroll=13).implementation == "unroll=13"
