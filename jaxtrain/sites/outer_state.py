"""Adds the outer state of the sites' exchange to a run's checkpoints, and restores it.

In a checkpoint the vectors of the fragments have the shapes of the parameters, so that a run may
resume on another mesh. A round that has started and is not applied is stored by what it began
with; after a restart its thread runs again, and sends the same bytes.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from jaxtrain.config.run_sections import SitesConfig
from jaxtrain.model.trees import named_leaves
from jaxtrain.sites.rounds import Rounds

NAME = "sites"  # of the outer state among the leaves of a checkpoint
SAME = ("period", "fragments", "codec", "rate", "momentum", "error_decay", "blend")


def check_same_rounds(cfg: SitesConfig, stored: Mapping[str, Any]) -> None:
    """Raises ValueError if a resumed run would have other rounds than before.

    With another period, the number of rounds that belong to a step changes, so that some are left
    out or several run at once. Rounds that other sites have already must give the same bits again.

    Args:
        stored: the checkpoint's config, by flag name. A field that it lacks did not exist yet, so
            that it had its default.
    """
    theirs = SitesConfig(
        **{name: stored[f"sites.{name}"] for name in vars(cfg) if f"sites.{name}" in stored}
    )
    changed = [name for name in SAME if getattr(cfg, name) != getattr(theirs, name)]
    if cfg.codec == theirs.codec == "float32":  # loses nothing
        changed = [name for name in changed if name != "error_decay"]
    if bool(cfg.delay) != bool(theirs.delay):  # only with a delay the checkpoint has the weights
        changed.append("delay")
    if not cfg.period or not theirs.period:  # the other fields are unused
        changed = [name for name in changed if name == "period"]
    if changed:
        got = "; ".join(
            f"sites.{x}={getattr(cfg, x)!r}, not {getattr(theirs, x)!r}" for x in changed
        )
        flags = ", ".join(f"--sites.{name}" for name in changed)
        raise ValueError(
            "a resumed run must exchange as it did before, since the other sites may have its next "
            f"rounds already; got {got}. Set {flags} as before; or, at all sites, --weights to "
            "this run's folder and a new --workdir."
        )


def _stored_vectors(rounds: Rounds) -> list[str]:
    """Returns which vectors of each fragment are stored."""
    cfg, names = rounds.cfg, ["reference"]
    names += ["momentum"] if cfg.momentum else []
    names += [] if rounds.codec.lossless else ["error"]
    return names + (["weights"] if cfg.delay else [])  # at the start of a pending round


def add_template(rounds: Rounds, template: Any) -> dict[str, Any]:
    """Returns the tree of ShapeDtypeStructs to restore, given that of the training state."""
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=leaf.sharding)
        for path, leaf in named_leaves(template.params).items()
    }
    return template._asdict() | {NAME: dict.fromkeys(_stored_vectors(rounds), params)}


def add_outer_state(
    rounds: Rounds, state: Any, step: int, stored_steps: list[int], keep_last: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the tree to save, and its meta. Waits for copies to the host that are running.

    Args:
        state: the training state after `step`.
        stored_steps: those of complete checkpoints, in order.
        keep_last: number of newest checkpoints from which the run must be able to resume. Codes
            that only older ones need are removed: checkpoints of --keep_every are never deleted.
    """
    rounds.exchange.flush()
    rounds.applied[step] = rounds.applied_rounds()
    if applied := rounds.applied.get(min(stored_steps[-keep_last:], default=-1)):
        rounds.exchange.durable({f: round_ + 1 for f, round_ in enumerate(applied)})
    stored = {name: {} for name in _stored_vectors(rounds)}
    for programs, outer in zip(rounds.places.programs, rounds.outer, strict=True):
        vectors = {"reference": outer.reference, "momentum": outer.momentum, "error": outer.error}
        pending = outer.pending
        vectors["weights"] = pending.weights.result() if pending else np.zeros_like(outer.reference)
        for name in stored:
            stored[name] |= programs.unflatten(programs.layout.to_devices(vectors[name]))
    fragments = [
        {"round": x.round, "step": x.step, "tokens": x.tokens, "pending": x.pending is not None}
        for x in rounds.outer
    ]
    name = rounds.places.names[rounds.places.site]
    meta = {"site": name, "finished_step": rounds.finished_step, "fragments": fragments}
    meta["ends"] = list(rounds.ends)
    return state._asdict() | {NAME: stored}, meta


def restore_outer_state(
    rounds: Rounds, tree: dict[str, Any], meta: dict[str, Any], state_class: Any
) -> Any:
    """Restores the outer state, starts pending rounds again, and returns the training state.

    Raises:
        ValueError: the checkpoint is that of another site, or lacks earlier ends of its run.
    """
    tree, name = dict(tree), rounds.places.names[rounds.places.site]
    if meta["site"] != name:
        raise ValueError(
            f"a site must resume from its own checkpoints; got those of {meta['site']} at site "
            f"{name}. Set --site or --workdir."
        )
    stored = tree.pop(NAME)
    state = state_class(**tree)
    rounds.begin(state)
    fragments = meta["fragments"]
    rounds.applied[int(state.step)] = [x["round"] - x["pending"] for x in fragments]
    rounds.finished_step = meta["finished_step"]
    rounds.ends = _read_ends(meta)
    for f, (programs, outer) in enumerate(zip(rounds.places.programs, rounds.outer, strict=True)):
        layout, flatten = programs.layout, programs.flatten
        vectors = {name: layout.to_host(flatten(leaves)) for name, leaves in stored.items()}
        weights = vectors.pop("weights", None)
        for name, vector in vectors.items():
            setattr(outer, name, vector)
        numbers = dict(meta["fragments"][f])
        is_pending = numbers.pop("pending")
        for name, number in numbers.items():
            setattr(outer, name, number)
        if is_pending:
            if weights is None:  # without a delay, the state is still that of the round's start
                weights = layout.to_host(programs.snapshot(state))
            copied = Future()
            copied.set_result(weights)
            rounds.exchange_weights(f, copied)
    return state


def _read_ends(meta: dict[str, Any]) -> list[int]:
    """Returns the steps at which the run of a checkpoint has ended before it was extended."""
    if "ends" in meta:
        return list(meta["ends"])
    # Older checkpoints have the number of ends: all were at multiples of the period, as 0 is. The
    # oldest ones have none, which matters only if the run has ended.
    finishes = meta.get("finishes", 0 if meta["finished_step"] is None else None)
    if finishes is None:
        raise ValueError(
            "a checkpoint of an extended run must list the steps at which the run ended before; an "
            f"older version saved this one, with finished_step={meta['finished_step']}. Set "
            "--weights to this run's folder and a new --workdir, at all sites."
        )
    return [0] * finishes
