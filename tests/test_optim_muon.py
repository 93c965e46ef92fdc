import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.axes import Axes
from jaxtrain.optim.muon import muon, scale_by_muon
from jaxtrain.optim.newton_schulz import NewtonSchulz

MATRIX = Axes.parse("L|D->F")


@pytest.fixture
def torch():
    reason = "torch is missing: install the crosscheck extra to compare with torch.optim.Muon"
    torch = pytest.importorskip("torch", reason=reason)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads are slower on matrices this small
    yield torch
    torch.set_num_threads(threads)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def first_step(transform, grads):
    return jax.jit(transform.update)(grads, transform.init(grads))[0]


def torch_moves(torch, weights, grads, dtype=None, adjust_lr_fn="original", nesterov=True):
    """Returns Muon's cumulative moves in PyTorch after each step, in our [I,O] layout.

    dtype: type of Newton-Schulz; None takes torch.optim.Muon, whose type is bfloat16.
    """
    parameters = [torch.nn.Parameter(torch.from_numpy(w.T.copy())) for w in weights]
    options = dict(lr=0.02, weight_decay=0.1, momentum=0.95, ns_steps=5)
    options |= dict(adjust_lr_fn=adjust_lr_fn, nesterov=nesterov)
    if dtype is None:
        optimizer = torch.optim.Muon(parameters, **options)
    else:
        from jaxtrain.crosscheck.torch_muon import Muon

        optimizer = Muon(parameters, dtype, **options)
    moves = []
    for step_grads in grads:
        for p, g in zip(parameters, step_grads, strict=True):
            p.grad = torch.from_numpy(g.T.copy())
        optimizer.step()
        pairs = zip(parameters, weights, strict=True)
        moves.append([p.detach().numpy().T - w for p, w in pairs])
    return moves


def our_moves(weights, grads, dtype, **options):
    """Returns our Muon's cumulative moves after each step."""
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


def weights_and_gradients(shapes, steps=60):
    rng = np.random.default_rng(0)
    draw = lambda: [rng.normal(size=s).astype(np.float32) for s in shapes]
    return [0.1 * w for w in draw()], [
        draw() for _ in range(steps)
    ]  # weights as small as a layer's


def distances(ours, theirs):
    return np.array(
        [
            [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*moves, strict=True)]
            for moves in zip(ours, theirs, strict=True)
        ]
    )


@pytest.mark.parametrize(
    "scale, adjust, nesterov",
    [("spectral_max", "original", True), ("match_rms", "match_rms_adamw", False)],
)
def test_sixty_steps_equal_muon_in_pytorch_in_float32(torch, scale, adjust, nesterov):
    weights, grads = weights_and_gradients([(96, 64), (64, 256), (128, 128)])
    options = dict(nesterov=nesterov, adjust_lr_fn=adjust)
    theirs = torch_moves(torch, weights, grads, torch.float32, **options)
    ours = our_moves(weights, grads, jnp.float32, nesterov=nesterov, scale=scale)
    assert distances(ours, theirs)[-1].max() <= 1e-5
    for our_step, their_step in zip(ours, theirs, strict=True):  # early moves are small
        for a, b, w in zip(our_step, their_step, weights, strict=True):
            assert np.abs(a - b).max() <= 60 * np.spacing(np.abs(w).max())


# Cumulative moves: the most at any step, and at the last one.
@pytest.mark.parametrize("form, most, last", [("auto", 5e-2, 1e-2), ("torch", 2e-2, 3e-3)])
def test_sixty_steps_equal_torch_muon_in_bf16(torch, form, most, last):
    weights, grads = weights_and_gradients([(32, 24), (24, 64), (32, 32)])
    newton_schulz = NewtonSchulz(form=form)
    ours = our_moves(weights, grads, jnp.bfloat16, newton_schulz=newton_schulz)
    off = distances(ours, torch_moves(torch, weights, grads))
    assert off.max() <= most
    assert form == "auto" or off[0].max() < 1e-5  # only the rounding of the parameters
    assert off[-1].max() <= last


def test_our_muon_in_pytorch_equals_torch_muon_bitwise_in_bf16(torch):
    weights, grads = weights_and_gradients([(32, 24), (24, 64), (32, 32)], steps=5)
    for adjust in ("original", "match_rms_adamw"):
        for nesterov in (True, False):
            options = dict(adjust_lr_fn=adjust, nesterov=nesterov)
            ours = torch_moves(torch, weights, grads, torch.bfloat16, **options)
            assert distances(ours, torch_moves(torch, weights, grads, **options)).max() == 0


def test_sixty_steps_equal_muon_in_pytorch_in_float64(torch):
    weights, grads = weights_and_gradients([(32, 24), (24, 64), (32, 32)])
    wide = lambda arrays: [x.astype(np.float64) for x in arrays]
    weights, grads = wide(weights), [wide(step_grads) for step_grads in grads]
    theirs = torch_moves(torch, weights, grads, torch.float64)
    with jax.enable_x64(True):
        for form in ("standard", "torch"):
            ours = our_moves(weights, grads, jnp.float64, newton_schulz=NewtonSchulz(form=form))
            assert distances(ours, theirs).max() <= 1e-10


@pytest.mark.parametrize("shape", [(512, 512), (256, 768), (768, 256)])
def test_scale_match_rms_gives_updates_the_rms_of_adamw(shape):
    muon = scale_by_muon(MATRIX, scale="match_rms")
    rms = float(jnp.sqrt(jnp.mean(first_step(muon, normal(1, *shape)) ** 2)))
    assert 0.183 <= rms <= 0.193  # smaller random matrices have more small singular values


def test_scale_spectral_max_is_sqrt_of_outputs_over_inputs_but_at_least_one():
    muon = scale_by_muon(MATRIX, dtype=jnp.float32)
    wide, tall = normal(1, 16, 64), normal(1, 16, 64).mT
    np.testing.assert_allclose(first_step(muon, wide), 2 * first_step(muon, tall).mT, rtol=1e-6)


def test_by_default_all_heads_form_one_matrix():
    g = normal(2, 12, 4, 3)
    heads = first_step(scale_by_muon(Axes.parse("L|D->HK")), g)
    assert jnp.array_equal(
        heads.reshape(2, 12, 12), first_step(scale_by_muon(MATRIX), g.reshape(2, 12, 12))
    )


def test_the_momentum_is_an_exponential_average_in_the_gradients_dtype():
    muon, g = scale_by_muon(MATRIX, momentum=0.9), normal(1, 4, 6)
    _, state = muon.update(g, muon.init(g))
    _, state = muon.update(2 * g, state)
    np.testing.assert_allclose(state.momentum, 0.09 * g + 0.2 * g, rtol=1e-5)
    assert state.momentum.dtype == g.dtype
    assert optax.tree.size(state) == g.size


def test_float64_gradients_are_orthogonalised_in_float64():
    with jax.enable_x64(True):
        g = normal(1, 16, 24).astype(jnp.float64)
        y = first_step(scale_by_muon(MATRIX), g)
        again = first_step(scale_by_muon(MATRIX), 3 * g)
        assert y.dtype == jnp.float64
        assert float(jnp.max(jnp.abs(y - again))) < 1e-12
