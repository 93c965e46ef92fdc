"""Causes that follow from digests alone: each test plants a linear relation in random tensors."""

import numpy as np
import pytest

from jaxtrain.crosscheck.causes import Evidence, find_causes, fit
from jaxtrain.crosscheck.trace import digest

NAMES = ("ours", "theirs")
RNG = np.random.default_rng(0)
GRADIENT, OLD, UPDATE, PARAMETER = (
    {name: RNG.normal(size=(6, 4)) for name in ("embed", "q", "up")} for _ in range(4)
)
SETTINGS = {"name": "muon", "ns_dtype": "float32", "clip_norm": 1.0, "adam_b1": 0.9}


def digests(tensors):
    return {name: np.array(digest(x)) for name, x in tensors.items()}


def causes(
    stage, ours, theirs, before=None, differing=(), precision="float32", size=0.1, **settings
):
    """Returns the causes as one text; `differing` names the tensors above their tolerance."""
    differing = list(differing) or list(GRADIENT)
    sizes = {name: size if name in differing else 1e-9 for name in GRADIENT}
    record = {"step": 1, "loss": 2.0, "grad_norm": 5.0}
    evidence = Evidence(
        record | ours, record | theirs, before or {}, sizes, differing, precision, NAMES,
        SETTINGS | settings,
    )  # fmt: skip
    return "; ".join(find_causes(stage, evidence))


def gradients(change):
    theirs = {name: change(x, OLD[name]) for name, x in GRADIENT.items()}
    before = {"gradient": digests(OLD)}
    return {"gradient": digests(GRADIENT)}, {"gradient": digests(theirs)}, before


PARTS = {"parts": {"targets_each": [8, 8, 8]}}


@pytest.mark.parametrize(
    "change, more, cause",
    [
        (
            lambda g, old: 3 * g,
            PARTS,
            "3 times ours's; the losses of the 3 micro-batches are added",
        ),
        (lambda g, old: 24 * g, PARTS, "the loss is the sum over the 24 targets"),
        (lambda g, old: 4096 * g, {}, "scaler.unscale_"),
        (
            lambda g, old: g / 7,
            {"grad_norm": 1.0},
            "clipped to a norm of 1: call before_step before",
        ),
        (lambda g, old: g + old, {}, "adds the gradients of the step before"),
        (lambda g, old: g + 1e-3 * old**2, {}, ""),
    ],
)
def test_the_relation_of_gradients_is_named(change, more, cause):
    ours, theirs, before = gradients(change)
    found = causes("gradient", ours | more, theirs | more, before)
    assert cause in found
    assert bool(found) == bool(cause)


def updates(change):
    theirs = {name: change(name, x, PARAMETER[name]) for name, x in UPDATE.items()}
    before = {"parameter": digests(PARAMETER)}
    return {"update": digests(UPDATE)}, {"update": digests(theirs)}, before


@pytest.mark.parametrize(
    "change, differing, cause",
    [
        (
            lambda name, u, p: u - 3e-4 * p * (name != "q"),
            ("embed", "up"),
            "theirs decays embed, up by 0.0003 of the parameter a step, and ours does not",
        ),
        (lambda name, u, p: u + 3e-4 * p, (), "theirs does not decay embed, q, up by 0.0003"),
        (
            lambda name, u, p: 0.1 * u,
            (),
            "theirs's updates are 0.1 times ours's: check the groups'",
        ),
        (lambda name, u, p: u * (2 if name == "q" else 1), ("q",), "updates of q are 2 times"),
        (lambda name, u, p: u + 0.05 * np.sin(u), ("q", "up"), "--optim.ns_form=torch"),
    ],
)
def test_the_relation_of_updates_is_named(change, differing, cause):
    assert cause in causes("optimizer", *updates(change), differing)


def test_updates_that_no_relation_explains_have_no_cause():
    changed = updates(lambda name, u, p: u + 0.1 * RNG.normal(size=u.shape))
    assert causes("optimizer", *changed, name="adamw") == ""


def test_the_constant_of_clip_grad_norm_is_named_where_it_explains_the_size():
    changed = updates(lambda name, u, p: u * (1 + 1e-8))
    options = {"precision": "float64", "size": 1e-8}
    assert "--optim.clip_eps=1e-06" in causes("optimizer", *changed, **options)
    assert "clip_eps" not in causes("optimizer", *changed, **options, clip_norm=0.0)
    assert "clip_eps" not in causes("optimizer", *changed, **options, clip_eps=1e-6)


@pytest.mark.parametrize(
    "ratio, cause",
    [(3.0, "divide each by 3"), (24.0, "the sum over the 24 targets"), (1.442695, "in bits")],
)
def test_the_ratio_of_losses_is_named(ratio, cause):
    assert cause in causes("loss", PARTS, PARTS | {"loss": 2.0 * ratio})


def test_a_mean_over_ignored_targets_is_named():
    tokens = {"tokens": [[0] * 11] * 3}  # 30 targets, of which 24 count
    assert "divides by all 30 targets" in causes("loss", PARTS | tokens, PARTS | {"loss": 1.6})


def test_transposed_and_rounded_start_parameters_are_named():
    square = {name: x for name, x in PARAMETER.items()}
    turned = {name: x.T for name, x in square.items()}
    start = lambda x: {"parameter": digests(x)}
    assert "transposed" in causes("start", start(square), start(turned))
    rounded = causes("start", start(square), start(UPDATE), size=2e-3)
    assert "rounding to bfloat16" in rounded and "transposed" not in rounded


def test_a_fit_finds_both_a_ratio_and_a_shift():
    x, p = UPDATE["q"], PARAMETER["q"]
    found = fit(*(np.array(digest(t)) for t in (x, 0.7 * x - 0.02 * p, p)))
    assert found.ratio == pytest.approx(0.7) and found.shift == pytest.approx(-0.02)
    assert found.residual < 1e-9


def test_a_recorded_loss_that_backward_was_not_called_on_is_named_if_the_gradients_agree():
    ours = {"gradient": digests(GRADIENT)}
    assert "recorded another loss" in causes("loss", ours, ours | PARTS | {"loss": 6.0})
    halved = {"gradient": digests({name: x / 2 for name, x in GRADIENT.items()}), "loss": 1.0}
    assert "recorded another loss" not in causes("loss", ours, halved)


def test_an_approximation_is_a_likely_cause_only_if_the_gradients_differ_as_little():
    for change, likely in ((1e-3, True), (1.0, False)):
        theirs = {name: x + change * OLD[name] for name, x in GRADIENT.items()}
        records = [
            {"activations": digests(layer), "gradient": digests(gradient)}
            for layer, gradient in (
                (GRADIENT, GRADIENT),
                ({n: x + 1e-3 * OLD[n] for n, x in GRADIENT.items()}, theirs),
            )
        ]
        assert ("TF32" in causes("forward", *records, size=1e-3)) == likely
