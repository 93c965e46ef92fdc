"""The fastest setting of a config that fits: micro-batch, remat and mesh, each compiled."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax

from jaxtrain.config.train_config import config_hash
from jaxtrain.distributed import memory
from jaxtrain.files import write_atomic
from jaxtrain.planning.compiled import compile_plan, with_model
from jaxtrain.planning.render import GIB, as_dict

VERSION = 3  # of the figures in a cache: another is made anew
REMATS = ("none", "dots", "attention", "full")  # from the least recomputation to the most
TIGHT = 0.8  # of the usable: gpt_1558m on an A40 is 17 % slower in 16 parts (0.89) than in 32
ENOUGH = 32_768  # tokens of a micro-batch; of gpt_124m twice as many change the bound by under 3 %


def figures_of(cfg, chip, gpus, hosts, links, cache=None) -> dict:
    """as_dict of a compiled plan, from `cache` (a folder) where this jax has made it before."""
    where = chip.name, gpus, hosts, links, memory.fraction()
    text = json.dumps([VERSION, config_hash(cfg), *where, jax.__version__])
    path = cache and Path(cache) / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    kept = path and read_cached(path)
    if kept:
        return kept
    found = json.loads(json.dumps(as_dict(compile_plan(cfg, chip, gpus, hosts), *links)))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(found))
    return found


def read_cached(path) -> dict | None:
    """Returns figures that were kept in a file; None if it is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def with_setting(cfg, accumulation, remat, fsdp=None, unroll=None, seq_len=None):
    """The TrainConfig with these; what is None is as it was, the tokens of a step are in any case.

    Args:
        fsdp: devices that share each copy of the parameters.

    Raises:
        ValueError: seq_len does not divide the tokens of a step.
    """
    data, mesh, model = cfg.data, cfg.mesh, {"remat": remat}
    if fsdp is not None:
        mesh = dataclasses.replace(mesh, replica=-1, fsdp=fsdp)
    if unroll is not None:
        model["unroll"] = unroll
    if seq_len is not None:
        tokens = data.batch * data.seq_len
        if tokens % seq_len:
            raise ValueError(
                f"lengths must divide the {tokens} tokens of a step; got {seq_len}. Set --seq_lens."
            )
        data = dataclasses.replace(data, batch=tokens // seq_len, seq_len=seq_len)
    cfg = dataclasses.replace(with_model(cfg, **model), accumulation=accumulation)
    return dataclasses.replace(cfg, data=data, mesh=mesh)


def flags_of(figures) -> str:
    """The setting as flags of a run."""
    return (
        f"--accumulation={figures['accumulation']} --model.remat={figures['remat']} "
        f"--mesh.fsdp={figures['fsdp']} --mesh.replica={figures['replica']} "
        f"--model.unroll={figures['unroll']} --data.batch={figures['batch']} "
        f"--data.seq_len={figures['seq_len']}"
    )


def accumulations(cfg, devices) -> list[int]:
    """What the batch can be cut into on so many devices, fewest parts first."""
    rows = cfg.data.batch // devices
    return [parts for parts in range(1, rows + 1) if rows % parts == 0]


def _fits_at(figures, micro_now, micro) -> bool:
    """Whether another micro-batch fits: what is no state grows with its rows, gradients do not."""
    m = figures["memory_bytes"]
    activations = m["activations and workspace"] * micro / micro_now
    return m["peak"] - m["activations and workspace"] + activations <= m["usable"]


def _is_tight(figures) -> bool:
    """Whether XLA may have made anew, unasked, what it had no room for; less at once is faster."""
    m = figures["memory_bytes"]
    return figures["fits"] and m["peak"] > TIGHT * m["usable"]


def search_settings(
    cfg, devices, evaluate, show=print, remats=REMATS, guess=None, variants=()
) -> list[dict]:
    """Figures of all that was compiled, the fastest that fits first.

    Of each remat the largest micro-batch is sought, up to ENOUGH tokens: a compile tells how memory
    grows with it, the next ones correct the guess. Where memory is tight, the next smaller one too.

    Args:
        evaluate: (accumulation, remat, **variant) -> figures.
        guess: (accumulation, remat) -> whether to begin there; None begins at the smallest rows.
        variants: further arguments of with_setting, that the fastest setting is tried with too.
    """
    choices, tried = accumulations(cfg, devices), {}
    rows = cfg.data.batch // devices
    most = max(ENOUGH // cfg.data.seq_len, 1)  # rows of a micro-batch
    choices = [p for p in choices if rows // p <= most]

    def look(parts, remat, **variant):
        key = parts, remat, *variant.items()
        if key not in tried:
            tried[key] = evaluate(parts, remat, **variant)
            show(line(tried[key]))
        return tried[key]

    for remat in remats:
        likely = (p for p in choices if guess and guess(p, remat))
        parts = next(likely, choices[-1])
        found = look(parts, remat)
        while found["memory_bytes"]["peak"] <= found["memory_bytes"]["usable"]:
            larger = [p for p in choices if p < parts and _fits_at(found, rows // parts, rows // p)]
            if not larger:
                break
            parts = larger[0]
            found = look(parts, remat)
        smaller = iter(choices[choices.index(parts) + 1 :])
        while not found["fits"] and (more := next(smaller, None)):
            found = look(more, remat)
        if _is_tight(found) and (more := next(smaller, None)):
            look(more, remat)
    rank = lambda figures: (not figures["fits"], -figures["tokens_per_s"])
    best = min(tried.values(), key=rank)
    for variant in variants if best["fits"] else ():
        if any(best[name] != value for name, value in variant.items()):
            look(best["accumulation"], best["remat"], **variant)
    return sorted(tried.values(), key=rank)


HEAD = "remat      parts  fsdp unroll    T  peak GiB  fits   tokens/s    MFU"


def line(figures) -> str:
    return (
        f"{figures['remat']:9} {figures['accumulation']:6} {figures['fsdp']:5} "
        f"{figures['unroll']:6} {figures['seq_len']:4} "
        f"{figures['memory_bytes']['peak'] / GIB:9.2f} {'yes' if figures['fits'] else 'no':>5} "
        f"{figures['tokens_per_s']:10,.0f} {figures['mfu_causal']:6.1%}"
    )


CONFIG = '''"""{name} as jaxtrain.plan --fit chose it for {devices} x {chip} with jax {version}.

    python -m jaxtrain.train --config=THIS_FILE
"""

from configs import {name}


def get_config():
    config = {name}.get_config()
    config.accumulation = {accumulation}
    config.model.remat = "{remat}"
    config.model.unroll = {unroll}
    config.mesh.update(replica={replica}, fsdp={fsdp})
    config.data.update(batch={batch}, seq_len={seq_len})
    return config
'''


def write_config(path, name, figures) -> None:
    """A config file that sets what the search chose over configs/NAME.py."""
    write_atomic(Path(path), CONFIG.format(name=name, version=jax.__version__, **figures))
