"""The diagnosis: a second compiled program that examines a step and changes nothing.

It recomputes the batch's gradient in microbatches, to see how much they differ, asks the optimizer
for the update it would make, and reports the `optim.diagnostics` of both. It is compiled only if
`diagnose_every` is set; the training step is the same either way.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain.distributed.mesh import replicated
from jaxtrain.optim import diagnostics
from jaxtrain.training.batch_arrays import microbatches
from jaxtrain.training.run import Run, compile_for_run
from jaxtrain.training.step import Step, build_gradient

PARTS = 8  # microbatches at most, unless accumulation asks for more


def compile_diagnosis(run: Run) -> Step:
    """Compiles diagnose(state, batch, run.rates()) -> {metric: float32 []}.

    Raises:
        ValueError: the batch cannot be split in two.
    """
    parts = count_parts(run.cfg.data.batch, run.cfg.accumulation, run.mesh)
    return compile_for_run(build_diagnosis(run, parts), run)


def count_parts(batch: int, accumulation: int, mesh: Mesh) -> int:
    """Returns the number of microbatches of a diagnosis, none larger than the training step's.

    Raises:
        ValueError: the batch cannot be split in two.
    """
    rows = mesh.shape["replica"] * mesh.shape["fsdp"]
    most = max(PARTS, accumulation)
    parts = max(n for n in range(1, most + 1) if batch % n == 0 and batch // n % rows == 0)
    if parts == 1:
        raise ValueError(
            f"diagnose_every needs two microbatches of replica x fsdp = {rows} rows; got "
            f"data.batch={batch}. Set --data.batch={2 * rows}, or --diagnose_every=0."
        )
    return parts


def build_diagnosis(run: Run, parts: int) -> Callable:
    """Returns diagnose(state, batch, rates) -> {"optim/GROUP/NAME": float32 []}, jitted.

    Its arguments are the training step's; nothing is donated.
    """
    cfg, axes = run.cfg.optim, run.model.axes
    part_tokens = run.cfg.data.batch * run.cfg.data.seq_len // parts
    gradient = build_gradient(run.model, run.loss, 1)

    def microbatch_gradients(state, batch):
        """Returns ((mean gradient, mean of squared norms), sampled coordinates [P,n])."""

        def add_microbatch(means, part):
            _, _, grads = gradient(state.params, part)
            squares = diagnostics.squared_norms(cfg, axes, grads)
            means = jax.tree.map(lambda mean, x: mean + x / parts, means, (grads, squares))
            return means, jax.tree.map(diagnostics.sampled, grads)

        zero_grads = jax.tree.map(jnp.zeros_like, state.params)
        zero_squares = diagnostics.squared_norms(cfg, axes, zero_grads)
        split = jax.tree.map(lambda x: microbatches(x, parts), batch)
        return jax.lax.scan(add_microbatch, (zero_grads, zero_squares), split)

    def diagnose(state, batch, rates):
        (grads, squares), coordinates = microbatch_gradients(state, batch)
        updates, opt_state = run.optimizer.update(
            grads, state.opt_state, state.params, good=True, rates=rates
        )
        moments = diagnostics.averaged_gradients(opt_state, state.params)
        # Each microbatch is in one difference only, so that the differences are independent.
        pairs = parts // 2 * 2
        differences = jax.tree.map(lambda x_Pn: x_Pn[1:pairs:2] - x_Pn[0:pairs:2], coordinates)
        batch_squares = diagnostics.squared_norms(cfg, axes, grads)
        return (
            diagnostics.weight_and_update_sizes(cfg, axes, state.params, grads, updates)
            | diagnostics.dual_norms(cfg, axes, grads, run.mesh)
            | diagnostics.spectra(cfg, axes, moments, updates)
            | diagnostics.noise_scales(squares, batch_squares, part_tokens, parts)
            | diagnostics.tail_indices(cfg, axes, differences)
        )

    return jax.jit(diagnose, out_shardings=replicated(run.mesh))
