import io

import numpy as np
import pytest
from matplotlib.image import imread

from jaxtrain.reporting.loss_curve import loss_curve, smooth


def falling(count):
    steps = np.arange(1.0, count + 1)
    return steps, 1.5 + 4 * np.exp(-steps / (0.1 * count))


def test_smoothing_does_not_change_a_straight_line():
    steps = np.arange(0.0, 5_000.0, 10)
    chosen, trend = smooth(steps, 7 - 1e-3 * steps)
    np.testing.assert_allclose(trend, 7 - 1e-3 * chosen, rtol=1e-12)


def test_smoothing_removes_noise_without_lagging_behind_the_fall():
    steps, losses = falling(2_000)
    noise = 0.1 * np.random.default_rng(0).standard_normal(2_000)
    chosen, trend = smooth(steps, losses + noise)
    error = (trend - np.interp(chosen, steps, losses))[chosen > 400]
    assert error.std() < 0.03 and abs(error.mean()) < 0.01


@pytest.mark.parametrize("count", [1, 20, 5_000])
def test_a_curve_of_any_length_is_drawn_on_a_white_background(count):
    train = list(zip(*falling(count), strict=True))
    picture = imread(io.BytesIO(loss_curve(train, [(count, 1.6)], "run\n1 parameter")))
    assert picture.shape[:2] == (1_080, 1_600)
    assert picture[0, 0].min() == 1 and 0.01 < (picture[..., :3].min(-1) < 0.9).mean() < 0.3


def test_losses_that_are_not_finite_do_not_change_the_picture():
    train = list(zip(*falling(100), strict=True))
    bad = train[:50] + [(50.5, np.nan), (50.6, np.inf)] + train[50:]
    assert loss_curve(bad, [], "run") == loss_curve(train, [], "run")


def test_a_curve_without_a_finite_loss_is_refused():
    with pytest.raises(ValueError, match="finite"):
        loss_curve([(1, np.nan)], [], "run")


@pytest.mark.parametrize("name", ["a$b$c", r"$\nosuch{$", "漢字"])
def test_any_folder_name_is_drawn_without_a_warning(name):
    points = [(1, 2.0), (2, 1.0)]
    assert loss_curve(points, [], f"{name}\n7 parameters").startswith(b"\x89PNG")
