import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.axes import Axes
from jaxtrain.optim.lmo import GEOMETRIES, SCALES, scale_by_lmo
from jaxtrain.optim.recipes import muon

MATRIX = Axes.parse("L|D->F")


@pytest.fixture
def torch():
    reason = "torch is missing: install the crosscheck extra to compare with torch.optim.Muon"
    torch = pytest.importorskip("torch", reason=reason)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them only fight over matrices this small
    yield torch
    torch.set_num_threads(threads)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def step(transform, grads):
    return jax.jit(transform.update)(grads, transform.init(grads))[0]


def torch_moves(torch, weights, grads, **options):
    """Cumulative moves of torch.optim.Muon after each step, in our [I,O] layout."""
    parameters = [torch.nn.Parameter(torch.from_numpy(w.T.copy())) for w in weights]
    optimizer = torch.optim.Muon(parameters, lr=0.02, weight_decay=0.1, **options)
    moves = []
    for step_grads in grads:
        for p, g in zip(parameters, step_grads, strict=True):
            p.grad = torch.from_numpy(g.T.copy())
        optimizer.step()
        pairs = zip(parameters, weights, strict=True)
        moves.append([p.detach().numpy().T - w for p, w in pairs])
    return moves


def our_moves(weights, grads, dtype, **options):
    """The same of ours."""
    axes = [MATRIX for _ in weights]
    optimizer = muon(axes, learning_rate=0.02, dtype=dtype, **options)
    start = [jnp.asarray(w)[None] for w in weights]

    @jax.jit
    def advance(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state, moves = start, optimizer.init(start), []
    for step_grads in grads:
        params, state = advance(params, state, [jnp.asarray(g)[None] for g in step_grads])
        moves.append([np.asarray(p - w)[0] for p, w in zip(params, start, strict=True)])
    return moves


def problem(shapes, steps=60):
    rng = np.random.default_rng(0)
    draw = lambda: [rng.normal(size=s).astype(np.float32) for s in shapes]  # noqa: E731
    return [0.1 * w for w in draw()], [draw() for _ in range(steps)]  # weights of a layer's size


def distances(ours, theirs):
    return np.array(
        [
            [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*moves, strict=True)]
            for moves in zip(ours, theirs, strict=True)
        ]
    )


@pytest.mark.parametrize(
    "scale, adjust", [("spectral_max", "original"), ("match_rms", "match_rms_adamw")]
)
@pytest.mark.parametrize("nesterov", [True, False])
def test_sixty_steps_equal_torch_muon_in_float32(torch, monkeypatch, scale, adjust, nesterov):
    weights, grads = problem([(96, 64), (64, 256), (128, 128)])
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    theirs = torch_moves(torch, weights, grads, nesterov=nesterov, adjust_lr_fn=adjust)
    ours = our_moves(weights, grads, jnp.float32, nesterov=nesterov, scale=scale)
    assert distances(ours, theirs)[-1].max() <= 1e-5
    for now, then in zip(ours, theirs, strict=True):  # early moves are small against the weights
        for a, b, w in zip(now, then, weights, strict=True):
            assert np.abs(a - b).max() <= 60 * np.spacing(np.abs(w).max())


def test_sixty_steps_equal_torch_muon_in_bf16(torch):
    weights, grads = problem([(32, 24), (24, 64), (32, 32)])
    off = distances(our_moves(weights, grads, jnp.bfloat16), torch_moves(torch, weights, grads))
    assert off.max() <= 5e-2
    assert off[-1].max() <= 1e-2


def test_sixty_steps_equal_torch_muon_in_float64(torch, monkeypatch):
    weights, grads = problem([(32, 24), (24, 64), (32, 32)])
    wide = lambda arrays: [x.astype(np.float64) for x in arrays]  # noqa: E731
    weights, grads = wide(weights), [wide(step_grads) for step_grads in grads]
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    with jax.enable_x64(True):
        ours = our_moves(weights, grads, jnp.float64, form="standard")
    assert distances(ours, torch_moves(torch, weights, grads)).max() <= 1e-10


def test_approximate_variance_reduction_is_nesterovs_momentum():
    """MARS-M's single-gradient form, unclipped, with gamma = 1 - beta. Source: arXiv 2510.21800"""
    beta, rng = 0.95, np.random.default_rng(0)
    gamma = 1 - beta
    muon = scale_by_lmo(MATRIX, lambda x_XIO: x_XIO, beta, scale="none", dtype=jnp.float64)
    with jax.enable_x64(True):
        mean = last = np.zeros((1, 6, 8))
        state = muon.init(jnp.asarray(mean))
        for _ in range(50):
            g = rng.normal(size=(1, 6, 8))
            corrected = g + gamma * beta / (1 - beta) * (g - last)
            mean, last = beta * mean + (1 - beta) * corrected, g
            direction, state = muon.update(jnp.asarray(g), state)
            np.testing.assert_allclose(direction, mean, rtol=0, atol=1e-12)


def test_the_size_of_the_gradient_does_not_matter():
    muon, g = scale_by_lmo(MATRIX, dtype=jnp.float32), normal(2, 8, 16)
    np.testing.assert_allclose(step(muon, 1e-3 * g), step(muon, 1e3 * g), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(512, 512), (256, 768), (768, 256)])
def test_match_rms_makes_the_update_as_large_as_adamw_makes_it(shape):
    muon = scale_by_lmo(MATRIX, scale="match_rms")
    rms = float(jnp.sqrt(jnp.mean(step(muon, normal(1, *shape)) ** 2)))
    assert 0.183 <= rms <= 0.193  # smaller random matrices have more small singular values


def test_the_spectral_max_scale_is_the_root_of_outputs_by_inputs_and_never_below_one():
    muon = scale_by_lmo(MATRIX, dtype=jnp.float32)
    wide, tall = normal(1, 16, 64), normal(1, 16, 64).mT
    np.testing.assert_allclose(step(muon, wide), 2 * step(muon, tall).mT, rtol=1e-6)


def test_a_zero_gradient_from_rest_moves_nothing():
    muon = scale_by_lmo({"w": MATRIX})
    grads = {"w": jnp.zeros((2, 8, 4))}
    assert jnp.array_equal(step(muon, grads)["w"], grads["w"])


def test_heads_are_seen_as_one_matrix_of_all_their_widths():
    g = normal(2, 12, 4, 3)
    heads = step(scale_by_lmo(Axes.parse("L|D->HK")), g)
    assert jnp.array_equal(
        heads.reshape(2, 12, 12), step(scale_by_lmo(MATRIX), g.reshape(2, 12, 12))
    )


def test_the_momentum_is_the_average_of_the_gradients_in_their_dtype():
    muon, g = scale_by_lmo(MATRIX, momentum=0.9), normal(1, 4, 6)
    _, state = muon.update(g, muon.init(g))
    _, state = muon.update(2 * g, state)
    np.testing.assert_allclose(state.momentum, 0.09 * g + 0.2 * g, rtol=1e-5)
    assert state.momentum.dtype == g.dtype
    assert optax.tree.size(state) == g.size


def test_float64_leaves_iterate_in_float64():
    with jax.enable_x64(True):
        g = normal(1, 16, 24).astype(jnp.float64)
        y = step(scale_by_lmo(MATRIX), g)
        again = step(scale_by_lmo(MATRIX), 3 * g)
        assert y.dtype == jnp.float64
        assert float(jnp.max(jnp.abs(y - again))) < 1e-12


def test_a_momentum_or_scale_out_of_range_names_its_flag():
    with pytest.raises(ValueError, match="--optim.momentum"):
        scale_by_lmo(MATRIX, momentum=1.0)
    with pytest.raises(ValueError, match="spectral_max, spectral, .*--optim.scale"):
        scale_by_lmo(MATRIX, scale="largest")


def singular_values(x_XIO):
    return np.linalg.svd(np.asarray(x_XIO, np.float64), compute_uv=False)


NORMS = {
    "spectral": lambda u: singular_values(u).max(-1),
    "sign": lambda u: np.abs(u).max((-2, -1)) * u.shape[-2],
    "column_norm": lambda u: np.sqrt(np.mean(u**2, -1)).max(-1),
    "row_norm": lambda u: np.sqrt(np.sum(u**2, -2) * u.shape[-2]).max(-1),
    "frobenius": lambda u: np.sqrt(np.mean(u**2, (-2, -1))),
}


@pytest.mark.parametrize("geometry", NORMS)
def test_a_step_has_unit_norm_and_no_unit_vector_descends_further(geometry):
    g = normal(2, 12, 20)
    options = {"coefficients": "polar_express", "steps": 8} if geometry == "spectral" else {}
    lmo = scale_by_lmo(MATRIX, geometry, scale="none", dtype=jnp.float32, **options)
    u = np.asarray(step(lmo, g), np.float64)
    norm = NORMS[geometry]
    np.testing.assert_allclose(norm(u), 1, rtol=1e-4)
    gain = np.sum(u * np.asarray(g), (-2, -1))
    for seed in range(1, 30):
        other = np.asarray(normal(2, 12, 20, seed=seed), np.float64) + 0.3 * seed * u
        other /= norm(other)[:, None, None]
        assert (np.sum(other * np.asarray(g), (-2, -1)) <= gain * (1 + 1e-4)).all()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_size_of_a_gradient_does_not_matter_in_any_norm(geometry, size):
    lmo = scale_by_lmo(MATRIX, geometry, dtype=jnp.float32, momentum=0.0)
    g = normal(2, 8, 6)
    np.testing.assert_allclose(step(lmo, size * g), step(lmo, g), rtol=2e-6)
    assert not jnp.any(step(lmo, 0 * g))


def test_a_geometry_may_be_a_function():
    halved = scale_by_lmo(MATRIX, lambda x_XIO: x_XIO / 2, 0.0, scale="none", dtype=jnp.float32)
    g = normal(1, 4, 6)
    np.testing.assert_array_equal(step(halved, g), g / 2)


def test_heads_apart_are_matrices_of_their_own():
    g = normal(2, 12, 4, 3)  # [L,D,H,K]
    axes = Axes.parse("L|D->HK")
    got = step(scale_by_lmo(axes, per_head=True, dtype=jnp.float32), g)
    for head in range(4):
        alone = step(scale_by_lmo(MATRIX, dtype=jnp.float32), g[:, :, head])
        np.testing.assert_allclose(got[:, :, head], alone, rtol=1e-5, atol=1e-6)


def test_a_narrow_buffer_halves_the_state_and_moves_the_step_little():
    g = normal(2, 16, 24)
    wide = scale_by_lmo(MATRIX, dtype=jnp.float32)
    narrow = scale_by_lmo(MATRIX, dtype=jnp.float32, buffer_dtype=jnp.bfloat16)
    assert narrow.init(g).momentum.nbytes * 2 == wide.init(g).momentum.nbytes
    a, b = step(wide, g), step(narrow, g)
    assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) < 2e-2
    assert b.dtype == jnp.float32


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_is_a_factor_of_the_same_direction(scale):
    g = normal(1, 16, 36)
    unit = step(scale_by_lmo(MATRIX, scale="none", dtype=jnp.float32), g)
    got = step(scale_by_lmo(MATRIX, scale=scale, dtype=jnp.float32), g)
    np.testing.assert_allclose(got, SCALES[scale](16, 36) * unit, rtol=1e-6)
