"""Arguments of the recipes: their values are checked, and errors name them."""

import dataclasses
import inspect
import math
import re
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

from jaxtrain.config.sections import OptimConfig
from jaxtrain.optim import Hyperparameter, recipes
from jaxtrain.optim.acceleration import ema_lookahead, gradient_transport
from jaxtrain.optim.clipping import clip_gradients
from jaxtrain.optim.noise import heavy_tailed_noise
from jaxtrain.optim.recipes import accelerated_lmo, muon

RECIPES = [muon, recipes.normuon, accelerated_lmo, recipes.soap, recipes.soap_muon]
RECIPES += [recipes.muon_h, recipes.adam_h, recipes.muown]
OWN_LOOP = Path(__file__).parent.parent / "docs" / "own_loop.md"
PARAMS = {"w": jnp.ones((2, 3)), "bias": jnp.ones(3)}

BAD_NUMBERS = [
    *(("learning_rate", value) for value in (-0.1, math.nan, math.inf, "0.02", None)),
    ("adam_learning_rate", -1.0),
    ("weight_decay", -1.0),
    ("adam_b1", -0.1),
    ("adam_b2", 1.0),
    ("adam_eps", -1e-8),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_out_of_range_are_refused_when_an_optimizer_is_built(recipe):
    for name, value in BAD_NUMBERS:
        with pytest.raises(ValueError, match=f"{name} must be .*; got {value!r}. Set .*{name}"):
            recipe(**{name: value})
    recipe(learning_rate=0, weight_decay=0.0, adam_eps=0.0)


def numbers_of(recipe):
    """Returns the names of the arguments that take a number, but no schedule."""
    arguments = inspect.signature(recipe).parameters.values()
    return [p.name for p in arguments if p.annotation in (Hyperparameter, Hyperparameter | None)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_schedule_is_refused_where_only_injection_can_pass_one(recipe):
    schedule = optax.constant_schedule(0.5)
    for name in numbers_of(recipe):
        message = f"{name} must be a number or an array; got .*inject_hyperparams.*{name}="
        with pytest.raises(ValueError, match=message):
            recipe(**{name: schedule})
    recipe(learning_rate=schedule, adam_learning_rate=schedule)
    accelerated_lmo(strength=schedule)


SGD = optax.sgd(0.1)
OF_A_SCHEDULE = {
    "max_norm": lambda x: clip_gradients(x),
    "eps": lambda x: clip_gradients(1.0, x),
    "alpha": lambda x: heavy_tailed_noise(x, 0.1),
    "scale": lambda x: heavy_tailed_noise(1.5, x),
    "momentum": lambda x: gradient_transport(SGD, x, 0.5),
    "decay": lambda x: ema_lookahead(SGD, 0.5, x),
}


@pytest.mark.parametrize("name", OF_A_SCHEDULE)
def test_other_transforms_refuse_a_schedule_of_a_number_too(name):
    with pytest.raises(ValueError, match=f"{name} must be a number or an array"):
        OF_A_SCHEDULE[name](optax.constant_schedule(1.5))


def test_a_strength_is_a_share_and_only_transport_reaches_one():
    gradient_transport(SGD, 0.9, 1)
    for strength in (-0.1, 2, math.nan, "0.5", None):
        with pytest.raises(ValueError, match=r"strength must be in \[0, 1\]; got"):
            accelerated_lmo(strength=strength)
    with pytest.raises(ValueError, match=r"strength must be in \[0, 1\); got 1. Set strength \("):
        ema_lookahead(SGD, 1)


WRONG_OPTIONS = {
    "scale": "rms",
    "strength": 2,
    "momentum": 1.0,
    "neuron_decay": 1.0,
    "newton_schulz": "euler",
    "decay": 1.0,
    "every": 0,
    "max_side": 0,
    "eps": -1.0,
    "adam_b1": 1.0,
    "final_radius": -1.0,
    "dtype": "int8",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_errors_of_a_recipe_name_its_argument_and_a_flag_only_in_parentheses(recipe):
    for name in sorted(WRONG_OPTIONS.keys() & inspect.signature(recipe).parameters.keys()):
        with pytest.raises(ValueError) as error:
            recipe(**{name: WRONG_OPTIONS[name]})
        message = str(error.value)
        assert f"{WRONG_OPTIONS[name]}. " in message.replace("'", "")
        assert f"Set {name}" in message
        assert "optim." not in re.sub(r" \(--optim\.\w+\)", "", message)


def test_options_of_muown_and_types_are_refused_too():
    with pytest.raises(ValueError, match="total_steps must .* final_radius=2.5; got 1"):
        recipes.muown(final_radius=2.5)
    for name in ("dtype", "buffer_dtype"):
        with pytest.raises(ValueError, match=f"{name} must be a floating type; got int8"):
            muon(**{name: "int8"}).init(PARAMS)


@pytest.mark.parametrize("recipe", RECIPES[:3])
def test_arguments_without_a_meaning_are_refused_at_once(recipe):
    with pytest.raises(ValueError, match="momentum.*1.5"):
        recipe(momentum=1.5)
    with pytest.raises(ValueError, match="spectral_max"):
        recipe(scale="unknown")
    with pytest.raises(ValueError, match="got 0.02. Pass .* learning_rate="):
        recipe(0.02)
    with pytest.raises(ValueError, match="needs params"):
        recipe().update(PARAMS, recipe().init(PARAMS))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_argument_of_a_recipe_is_named_as_injection_requires(recipe):
    kinds = {p.kind for p in inspect.signature(recipe).parameters.values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    assert not any(callable(p.default) for p in inspect.signature(recipe).parameters.values())


def test_the_page_states_the_defaults_of_every_recipe_and_of_the_trainer():
    fields = ["learning_rate", "weight_decay", "momentum", "scale"]

    def row(name, values):
        cells = (f" {values[field]} " if field in values else " " for field in fields)
        return f"| {name} |{'|'.join(cells)}|"

    def defaults(recipe):
        return {p.name: p.default for p in inspect.signature(recipe).parameters.values()}

    rows = [row(f"`{recipe.__name__}`", defaults(recipe)) for recipe in RECIPES]
    rows.append(row("the trainer, with any `optim.name`", dataclasses.asdict(OptimConfig())))
    assert [line for line in rows if line not in OWN_LOOP.read_text().splitlines()] == []
    adam = {"adam_learning_rate": 0.003, "adam_b1": 0.9, "adam_b2": 0.95, "adam_eps": 1e-8}
    for values in (*map(defaults, RECIPES), dataclasses.asdict(OptimConfig())):
        assert {name: values[name] for name in adam} == adam
