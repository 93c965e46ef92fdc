"""Shampoo's factors and their eigenbases, in which SOAP and SOAP-Muon divide the momentum.

A gradient G [I,O] has two factors: the average of G G^T [I,I] and that of G^T G [O,O]. The factors'
eigenvectors are two orthogonal bases, P and Q, and P^T G Q is the rotated gradient. The bases are
computed by a full decomposition in the first step. Later they are improved every few steps, by one
step of power iteration and a QR decomposition.

Beside momentum and squares, each matrix stores a factor and a basis of both sides. In float32 all
of its state is 8 + 8 (I^2 + O^2) / (I O) bytes per weight, which is 36 for gpt_124m.
preconditioner_cost.py counts the FLOPs.

Source: Vyas et al. 2024, https://arxiv.org/abs/2409.11321, and its code, nikhilvyas/SOAP, soap.py
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxtrain.axes import Axes
from jaxtrain.config.sections import OptimConfig
from jaxtrain.distributed.mesh import platform
from jaxtrain.model.trees import AxesTree
from jaxtrain.optim import Hyperparameter, check_decay, check_number, how_to_set, is_number
from jaxtrain.optim.chunks import GPU_CHUNK_BYTES, map_chunks
from jaxtrain.optim.lmo import buffer_dtype
from jaxtrain.optim.owners import from_owners, ownership, to_owners
from jaxtrain.optim.precision import average, widest, zero_buffers

CPU_CHUNK_BYTES = 2**26
MAX_SIDE = 10_000  # the source's limit: above hidden widths, below most vocabularies


class OwnedBuffers(NamedTuple):
    """Buffers of one parameter with X matrices, or of all parameters: each field like params.

    A side that is too long to precondition has None for its factor and basis.
    """

    momentum: Any  # averaged gradient, not rotated, in the parameter's shape
    square: Any  # [X,I,O], averaged square of the rotated gradient
    input_factor: Any  # [X,I,I], average of G G^T
    input_basis: Any  # [X,I,I], its eigenvectors in columns, the largest eigenvalue first
    output_factor: Any  # [X,O,O], average of G^T G
    output_basis: Any  # [X,O,O]


class SoapState(NamedTuple):
    count: jax.Array  # int32 [], steps with finite gradients
    owned: OwnedBuffers  # each matrix's buffers are on the device that steps it: see owners.py


class Progress(NamedTuple):
    """How far the run is at a step, and whether the step counts."""

    count: jax.Array  # int32 [], good steps before this one
    good: jax.Array  # bool [], the gradients are finite

    @property
    def has_bases(self) -> jax.Array:
        """Whether a step before this one has computed the bases."""
        return self.count > 0

    def average(
        self, decay: Hyperparameter, old: jax.Array, new: jax.Array, when: Any = True
    ) -> jax.Array:
        """Averages `new` into `old` if the gradients are finite and `when` is true."""
        mean = average(decay, old, new, widest(old, new))
        return jnp.where(self.good & when, mean.astype(old.dtype), old)


# (gradient, its buffers, Progress) -> (direction, buffers with new momentum and square); gradient,
# direction and momentum are [X,I,O] here.
Direction = Callable[[jax.Array, OwnedBuffers, Progress], tuple[jax.Array, OwnedBuffers]]


def _product(equation, a, b):
    """Computes an einsum in full float32: TF32 would lose the small eigenvalues of the factors."""
    return jnp.einsum(equation, a, b, precision="highest")


def rotate(x_XIO: jax.Array, state: OwnedBuffers) -> jax.Array:
    """Computes P^T x Q; a side without a basis stays as it is."""
    if state.input_basis is not None:
        x_XIO = _product("xij,xio->xjo", state.input_basis, x_XIO)
    if state.output_basis is not None:
        x_XIO = _product("xio,xop->xip", x_XIO, state.output_basis)
    return x_XIO


def rotate_back(x_XIO: jax.Array, state: OwnedBuffers) -> jax.Array:
    """Computes P x Q^T, which undoes `rotate`."""
    if state.input_basis is not None:
        x_XIO = _product("xij,xjo->xio", state.input_basis, x_XIO)
    if state.output_basis is not None:
        x_XIO = _product("xip,xop->xio", x_XIO, state.output_basis)
    return x_XIO


def _update_factors(g_XIO, state, decay, progress):
    """Averages the gradient's Gram matrices into the factors."""
    if state.input_factor is not None:
        gram_XII = _product("xio,xjo->xij", g_XIO, g_XIO)
        state = state._replace(input_factor=progress.average(decay, state.input_factor, gram_XII))
    if state.output_factor is not None:
        gram_XOO = _product("xio,xip->xop", g_XIO, g_XIO)
        state = state._replace(output_factor=progress.average(decay, state.output_factor, gram_XOO))
    return state


def _decompose(state):
    """Returns the state with all eigenvectors of its factors."""
    eigenvectors = lambda factor: None if factor is None else jnp.linalg.eigh(factor)[1][..., ::-1]
    return state._replace(
        input_basis=eigenvectors(state.input_factor),
        output_basis=eigenvectors(state.output_factor),
    )


def _iterate(state):
    """Improves the bases by one step of power iteration, and reorders the squares like them."""
    bases, square_XIO = [], state.square
    sides = (state.input_factor, state.input_basis), (state.output_factor, state.output_basis)
    for dim, (factor_XNN, basis_XNN) in enumerate(sides, 1):
        if factor_XNN is None:
            bases.append(None)
            continue
        image_XNN = _product("xij,xjk->xik", factor_XNN, basis_XNN)
        values_XN = jnp.sum(basis_XNN * image_XNN, -2)  # Rayleigh quotients estimate eigenvalues
        order_XN = jnp.argsort(-values_XN, axis=-1)
        square_XIO = jnp.take_along_axis(square_XIO, jnp.expand_dims(order_XN, 3 - dim), dim)
        image_XNN = jnp.take_along_axis(image_XNN, order_XN[:, None, :], 2)
        bases.append(jnp.linalg.qr(image_XNN)[0])
    return state._replace(square=square_XIO, input_basis=bases[0], output_basis=bases[1])


def _refresh_bases(state, progress, every):
    """Computes the bases in the first good step and improves them in every `every`-th later one."""
    due = jnp.where(progress.count == 0, 2, jnp.where(progress.count % every == 0, 1, 0))
    branches = [lambda state: state, _iterate, _decompose]
    return jax.lax.switch(jnp.where(progress.good, due, 0), branches, state)


def _new_buffers(axes, p, max_side, buffer_dtype):
    X, I, O = axes.matrix_shape(p.shape)  # noqa: E741
    wide = widest(p)

    def side(N):
        if N > max_side:
            return None, None
        return jnp.zeros((X, N, N), wide), jnp.broadcast_to(jnp.eye(N, dtype=wide), (X, N, N))

    square = jnp.zeros((X, I, O), wide)
    return OwnedBuffers(zero_buffers(p, buffer_dtype), square, *side(I), *side(O))


def _transpose(treedef, states):
    """Turns a list of OwnedBuffers into OwnedBuffers of trees."""
    return OwnedBuffers(*(treedef.unflatten(field) for field in zip(*states, strict=True)))


def _chunk_size(state, chunk_bytes):
    """Returns the largest divisor of X whose matrices' factors fit in chunk_bytes; 1 at least."""
    factors = [x for x in (state.input_factor, state.output_factor) if x is not None]
    matrix_bytes = sum(x[0].nbytes for x in factors)
    X = len(state.square)
    fits = [n for n in range(1, X + 1) if X % n == 0 and n * matrix_bytes <= chunk_bytes]
    return max(fits, default=1)


def precondition(
    axes: AxesTree,
    direction: Direction,
    decay: Hyperparameter,
    every: Hyperparameter,
    max_side: int = MAX_SIDE,
    buffer_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    finish: Callable[[Axes, jax.Array], jax.Array] = lambda axes, u: u,
    chunk_bytes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds a transform that keeps factors and bases for a direction that uses them.

    A step uses the bases of the steps before it, as in the source, so that the gradient is not
    rotated by bases that were fitted to it. `update(..., good=False)` leaves the state unchanged.

    On a mesh each device steps whole matrices, and only it stores their buffers (owners.py). The
    gradient travels to the device and the step back; factors and bases never move.

    Args:
        axes: pytree of Axes, like params, all matrices.
        decay: decay of the factors, in [0, 1).
        every: steps from one refresh of the bases to the next; a whole number.
        max_side: a longer side of a matrix has no factor and is not rotated.
        buffer_dtype: type of the momentum; None means the parameter's, float32 at least, which
            all else is stored in.
        mesh: mesh over which params are split; None means one device.
        finish: maps the direction of a parameter, in its shape, to the step.
        chunk_bytes: bound on the factors of those matrices of a stack that are stepped at one time;
            temporaries are about four times as large.

    Raises:
        ValueError: decay, every or max_side is out of range.
    """
    check_decay(decay, "decay", "optim.precondition_decay")
    _check_count(every, "every")
    if not is_number(max_side):
        raise ValueError(
            f"max_side decides shapes, so it must be a number; got {max_side}. Give "
            'optax.inject_hyperparams static_args=("max_side",).'
        )
    _check_count(max_side, "max_side")
    all_axes, treedef = jax.tree.flatten(axes)
    default_bytes = CPU_CHUNK_BYTES if platform() == "cpu" else GPU_CHUNK_BYTES
    most_bytes = default_bytes if chunk_bytes is None else chunk_bytes

    def init(params):
        leaves = zip(all_axes, treedef.flatten_up_to(params), strict=True)
        states = [_new_buffers(a, p, max_side, buffer_dtype) for a, p in leaves]
        return SoapState(jnp.zeros((), jnp.int32), _transpose(treedef, states))

    def step_leaf(a, g, state, progress):
        def step_chunk(chunk):
            g_XIO, state = chunk
            u_XIO, state = direction(g_XIO, state, progress)
            state = _update_factors(g_XIO, state, decay, progress)
            return u_XIO.astype(g_XIO.dtype), _refresh_bases(state, progress, every)

        g_XIO = a.to_matrices(g.astype(widest(g, state.square)))
        in_matrices = state._replace(momentum=a.to_matrices(state.momentum))
        size = _chunk_size(state, most_bytes)
        u_XIO, after = map_chunks(step_chunk, (g_XIO, in_matrices), size)
        momentum = a.from_matrices(after.momentum, g.shape)
        return finish(a, a.from_matrices(u_XIO, g.shape)), after._replace(momentum=momentum)

    def step_all(grads, owned, progress):
        fields = (treedef.flatten_up_to(field) for field in owned)
        states = [OwnedBuffers(*leaf) for leaf in zip(*fields, strict=True)]
        leaves = zip(all_axes, treedef.flatten_up_to(grads), states, strict=True)
        updates, states = zip(*(step_leaf(*leaf, progress) for leaf in leaves), strict=True)
        return treedef.unflatten(updates), _transpose(treedef, states)

    def update(updates, state, params=None, *, good: jax.Array | bool = True, **extra):
        del params, extra
        step = step_all if mesh is None or mesh.size == 1 else _on_owners(step_all, axes, mesh)
        progress = Progress(state.count, jnp.asarray(good))
        steps, owned = step(updates, state.owned, progress)
        return steps, SoapState(state.count + jnp.where(good, 1, 0), owned)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_count(value, argument):
    flag = f"optim.precondition_{argument}"
    check_number(value, argument, flag)
    if is_number(value) and value < 1:
        hint = how_to_set(argument, flag)
        raise ValueError(f"{argument} must be 1 or more; got {value}. {hint}")


def _on_owners(step_all, axes, mesh):
    """Runs step_all on the owners of the matrices: XLA would gather the operands of eigh and QR."""

    def step(grads, owned, progress):
        layouts = jax.tree.map(lambda a, g: ownership(a, g.shape, mesh), axes, grads)
        each = lambda function: jax.tree.map(lambda _, layout: function(layout), axes, layouts)
        stored, moves = each(lambda layout: layout.stored), each(lambda layout: layout.moves)
        buffers = OwnedBuffers(*[each(lambda layout: layout.owned)] * len(owned))

        def on_device(grads, owned, progress):
            carry = lambda move: lambda _, x, moves: move(x, moves, mesh)
            grads = jax.tree.map(carry(to_owners), axes, grads, moves)
            steps, owned = step_all(grads, owned, progress)
            return jax.tree.map(carry(from_owners), axes, steps, moves), owned

        mapped = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(stored, buffers, P()),
            out_specs=(stored, buffers),
            check_vma=False,  # it cannot prove that devices with equal matrices compute the same
        )
        return mapped(grads, owned, progress)

    return step


def preconditioner_options(cfg: OptimConfig) -> dict[str, Any]:
    """Returns the arguments of `precondition` that a config decides."""
    return {
        "decay": cfg.precondition_decay,
        "every": cfg.precondition_every,
        "max_side": cfg.precondition_max_side,
        "buffer_dtype": buffer_dtype(cfg),
    }
