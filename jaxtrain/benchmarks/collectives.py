"""Lists what each optimizer's update sends and stores on each mesh of 8 devices.

    python -m jaxtrain.benchmarks.collectives              # the tables of docs/optimizers.md
    python -m jaxtrain.benchmarks.collectives muon adamw

It compiles one update of a small model (7 matrices of 3 shapes, with clipping) for 8 virtual CPU
devices and reads the compiled program; nothing is timed. Newton-Schulz computes in float32, because
XLA's CPU backend widens collectives in bfloat16.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import optax

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import MeshConfig, OptimConfig
from jaxtrain.distributed.mesh import build_mesh, param_sharding
from jaxtrain.metrics.hlo_collectives import find_collectives
from jaxtrain.optim import select_option
from jaxtrain.optim.build import OPTIMIZERS, build_optimizer, state_shardings
from jaxtrain.optim.param_groups import MATRICES
from pallas_kernels.hlo import Program

DEVICES = 8
SIZES = {"D": 64, "H": 4, "G": 2, "K": 16, "F": 192, "V": 128}
ATTENTION = {"q": "L|D->HK", "k": "L|D->GK", "v": "L|D->GK", "o": "L|HK->D"}
MLP = {"gate": "L|D->F", "up": "L|D->F", "down": "L|F->D"}
AXES = {name: Axes.parse(text) for name, text in (ATTENTION | MLP).items()}
AXES |= {"gain": Axes.parse("L|D"), "embed": Axes.parse("V|D")}
# Label -> replica x fsdp x tensor, and layers. The replicas do not divide 6 layers.
MESHES = {
    "8x1x1": ((8, 1, 1), 8),
    "8x1x1, 6 layers": ((8, 1, 1), 6),
    "1x8x1": ((1, 8, 1), 8),
    "1x4x2": ((1, 4, 2), 8),
    "2x2x2": ((2, 2, 2), 8),
}
KINDS = ("all-to-all", "all-gather", "all-reduce")


def measure_update(name: str, label: str) -> dict[str, Any]:
    """Returns the row of one optimizer on one mesh; the bytes are per matrix parameter."""
    sizes, layers = MESHES[label]
    mesh = build_mesh(MeshConfig(*sizes), jax.devices()[:DEVICES])
    cfg = OptimConfig(name=name, ns_dtype="float32", weight_decay=0.1)
    optimizer = build_optimizer(cfg, AXES, mesh)

    def with_shardings(tree, shardings):
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.tree.map(place, tree, shardings)

    shapes = {
        key: jax.ShapeDtypeStruct(a.shape(SIZES | {"L": layers}), "float32")
        for key, a in AXES.items()
    }
    placed = {key: param_sharding(AXES[key], x.shape, mesh) for key, x in shapes.items()}
    params = with_shardings(shapes, placed)
    state = with_shardings(
        jax.eval_shape(optimizer.init, shapes), state_shardings(optimizer, AXES, shapes, mesh)
    )

    def update(params, state, grads):
        steps, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, steps), state

    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    step = jax.jit(update, donate_argnums=(0, 1), out_shardings=shardings)
    text = step.lower(params, state, params).compile().as_text()
    found = find_collectives(Program(text or ""), mesh)
    counts = Counter({kind: 0 for kind in KINDS})
    for collective in found:
        counts[collective.kind] += collective.times
    matrices = sum(math.prod(x.shape) for key, x in shapes.items() if AXES[key].is_matrix)
    buffers = jax.tree.leaves(state[-1].inner_states[MATRICES])
    stored = lambda shape_of: sum(math.prod(shape_of(x)) * x.dtype.itemsize for x in buffers)
    whole, on_device = stored(lambda x: x.shape), stored(lambda x: x.sharding.shard_shape(x.shape))
    return {
        "case": label,
        "variant": name,
        "counts": dict(counts),
        "sent_bytes": sum(collective.wire_bytes for collective in found) / matrices,
        "state_bytes": whole / matrices,
        "split_over": whole / on_device,
    }


def counts_cell(row: dict[str, Any]) -> str:
    """Returns the numbers of all-to-alls, all-gathers and all-reduces, and any others by name."""
    counts = row["counts"]
    cells = [str(counts[kind]) for kind in KINDS]
    return " + ".join(cells + [f"{n} {kind}" for kind, n in counts.items() if kind not in KINDS])


def bytes_cell(row: dict[str, Any]) -> str:
    """Returns the bytes sent, the bytes of state, and over how many devices this is split."""
    return f"{row['sent_bytes']:.1f}; {row['state_bytes']:.1f} / {row['split_over']:.0f}"


TABLES = {
    "all-to-all + all-gather + all-reduce": counts_cell,
    "bytes sent; state / split over": bytes_cell,
}


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Returns two Markdown tables: the counts, and the bytes sent and stored."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["variant"], {})[row["case"]] = row

    def table(title, cell):
        lines = [[title, *cases], ["---"] * (len(cases) + 1)]
        for name, of in by_name.items():
            lines.append([f"`{name}`", *(cell(of[case]) for case in cases)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    return "\n\n".join(table(title, cell) for title, cell in TABLES.items())


def main(names: Sequence[str]) -> None:
    for name in names:
        select_option(OPTIMIZERS, name, "optim.name")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    cases = [(name, label) for name in names or OPTIMIZERS for label in MESHES]
    print(tables([measure_update(name, label) for name, label in cases]))


if __name__ == "__main__":
    main(sys.argv[1:])
