"""Searches for a config's fastest micro-batch, remat, mesh and unroll that fit a chip's memory.

Every setting that the search tries is compiled for the chip, so it tries few. Compiled figures are
cached on disk.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain.config.train_config import TrainConfig, config_hash
from jaxtrain.distributed import memory
from jaxtrain.files import write_atomic
from jaxtrain.planning.compiled import compile_plan, with_model
from jaxtrain.planning.hardware import Hardware, resolve_remat_for
from jaxtrain.planning.render import GIB, plan_dict
from jaxtrain.reporting.table import format_table
from jaxtrain.training.memory_formula import estimate_memory
from jaxtrain.training.remat import TIGHT

CACHE_VERSION = 5  # figures of other versions are computed again
REMATS = ("none", "dots", "attention", "full")  # from the least recomputation to the most
# Micro-batches of more tokens are not tried: doubling these improves gpt_124m's bound by under 3 %.
ENOUGH_TOKENS = 32_768

Figures = dict[str, Any]  # as plan_dict returns them


def compiled_figures(cfg: TrainConfig, hardware: Hardware, cache: str = "") -> Figures:
    """Returns plan_dict of a compiled plan; reads it from the folder `cache` if it is there."""
    cfg = resolve_remat_for(cfg, hardware)[0]  # a later formula may choose differently
    chip, gpus, hosts, *links = hardware
    key = [CACHE_VERSION, config_hash(cfg), chip.name, gpus, hosts, links, memory.fraction()]
    text = json.dumps([*key, jax.__version__])
    path = Path(cache) / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    if cache and (cached := read_cached(path)):
        return cached
    # Through JSON, so that fresh and cached figures have the same types.
    figures = json.loads(json.dumps(plan_dict(compile_plan(cfg, hardware))))
    if cache:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(figures))
    return figures


def read_cached(path: Path) -> Figures | None:
    """Returns the figures in a cache file; None if it is missing or damaged."""
    try:
        figures = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return figures if isinstance(figures, dict) else None


def with_setting(
    cfg: TrainConfig,
    accumulation: int,
    remat: str,
    fsdp: int | None = None,
    unroll: int | None = None,
    seq_len: int | None = None,
) -> TrainConfig:
    """Returns the config with another setting and the same tokens per step; None changes nothing.

    Args:
        fsdp: devices that share one copy of the parameters.

    Raises:
        ValueError: seq_len does not divide the tokens of a step.
    """
    data, mesh = cfg.data, cfg.mesh
    unroll = cfg.model.unroll if unroll is None else unroll
    if fsdp is not None:
        mesh = dataclasses.replace(mesh, replica=-1, fsdp=fsdp)
    if seq_len is not None:
        if data.batch_schedule:
            raise ValueError(
                f"other lengths need steps of one size; got data.batch_schedule="
                f"{data.batch_schedule!r}. Leave out --seq_lens, or set --data.batch_schedule=''."
            )
        tokens = data.batch * data.seq_len
        if tokens % seq_len:
            raise ValueError(
                f"lengths must divide the {tokens} tokens of a step; got {seq_len}. Set --seq_lens."
            )
        data = dataclasses.replace(data, batch=tokens // seq_len, seq_len=seq_len)
    cfg = with_model(cfg, remat=remat, unroll=unroll)
    return dataclasses.replace(cfg, accumulation=accumulation, data=data, mesh=mesh)


def setting_flags(figures: Figures) -> str:
    """Returns the flags that give a run this setting."""
    return (
        f"--accumulation={figures['accumulation']} --model.remat={figures['remat']} "
        f"--mesh.fsdp={figures['fsdp']} --mesh.replica={figures['replica']} "
        f"--model.unroll={figures['unroll']} --data.batch={figures['batch']} "
        f"--data.seq_len={figures['seq_len']}"
    )


def accumulations(cfg: TrainConfig, devices: int) -> list[int]:
    """Returns all numbers of micro-batches into which the batch can be cut, ascending."""
    rows = cfg.data.batch // devices
    counts = [count for count in range(1, rows + 1) if rows % count == 0]
    sizes = [phase.sequences for phase in cfg.data.sizes.phases]
    return [n for n in counts if all(size % (cfg.data.batch // n) == 0 for size in sizes)]


def stronger_remats(cfg: TrainConfig) -> tuple[str, ...]:
    """Returns the config's remat, which must not be "auto", and all that recompute more."""
    return REMATS[REMATS.index(cfg.model.remat) :]


def evaluate_setting(
    cfg: TrainConfig, hardware: Hardware, cache: str, accumulation: int, remat: str, **variant: int
) -> Figures:
    """Compiles the config with another setting and returns its figures; see with_setting."""
    return compiled_figures(with_setting(cfg, accumulation, remat, **variant), hardware, cache)


def fits_by_formula(cfg: TrainConfig, hardware: Hardware, accumulation: int, remat: str) -> bool:
    """Returns whether the config fits with another setting, by the memory formula."""
    setting = with_setting(cfg, accumulation, remat)
    return estimate_memory(setting, hardware.devices).peak <= hardware.usable_bytes


def search_settings(
    cfg: TrainConfig,
    devices: int,
    evaluate: Callable[..., Figures],
    fits: Callable[[int, str], bool],
    show: Callable[[str], Any],
    remats: Sequence[str] = REMATS,
    variants: Sequence[dict[str, int]] = (),
) -> list[Figures]:
    """Returns the figures of every setting that was compiled, the fastest that fits first.

    For each remat it looks for the largest micro-batch that fits, up to ENOUGH_TOKENS. The formula
    gives the first guess. Each compiled setting then shows how much memory a row really takes,
    which gives the next guess. Where memory is tight, the next smaller micro-batch is tried too.

    Args:
        evaluate: of (accumulation, remat, **variant); compiles the setting.
        fits: of (accumulation, remat); predicts by the memory formula.
        variants: further arguments of with_setting, tried on the fastest setting.
    """
    rows = cfg.data.batch // devices
    most_rows = max(ENOUGH_TOKENS // cfg.data.seq_len, 1)
    choices = [count for count in accumulations(cfg, devices) if rows // count <= most_rows]
    tried: dict[tuple, Figures] = {}

    def try_setting(accumulation: int, remat: str, **variant: int) -> Figures:
        key = accumulation, remat, *variant.items()
        if key not in tried:
            tried[key] = evaluate(accumulation, remat, **variant)
            show(describe_setting(tried[key]))
        return tried[key]

    for remat in remats:
        count = next((n for n in choices if fits(n, remat)), choices[-1])
        figures = try_setting(count, remat)
        while figures["fits"]:
            # Only activations grow with the rows of a micro-batch.
            sizes = figures["memory_bytes"]
            activations = sizes["activations and workspace"]
            most_growth = 1 + (sizes["usable"] - sizes["peak"]) / max(activations, 1)
            larger = [n for n in choices if n < count <= n * most_growth]
            if not larger:
                break
            count = larger[0]
            figures = try_setting(count, remat)
        smaller = iter(choices[choices.index(count) + 1 :])
        while not figures["fits"] and (n := next(smaller, None)):
            figures = try_setting(n, remat)
        sizes = figures["memory_bytes"]
        is_tight = figures["fits"] and sizes["peak"] > TIGHT * sizes["usable"]
        if is_tight and (n := next(smaller, None)):
            try_setting(n, remat)
    rank = lambda figures: (not figures["fits"], -figures["tokens_per_s"])
    best = min(tried.values(), key=rank)
    for variant in variants if best["fits"] else ():
        if any(best[name] != value for name, value in variant.items()):
            try_setting(best["accumulation"], best["remat"], **variant)
    return sorted(tried.values(), key=rank)


def search_hardware(
    cfg: TrainConfig,
    hardware: Hardware,
    cache: str,
    show: Callable[[str], Any] = lambda text: None,
    **options: Any,
) -> list[Figures]:
    """Returns what search_settings finds on some hardware; `options` are its last arguments."""
    evaluate = functools.partial(evaluate_setting, cfg, hardware, cache)
    fits = functools.partial(fits_by_formula, cfg, hardware)
    return search_settings(cfg, hardware.devices, evaluate, fits, show, **options)


def describe_setting(figures: Figures) -> str:
    """Returns one line about a compiled setting: its flags, its memory and whether it fits."""
    peak = figures["memory_bytes"]["peak"] / GIB
    return (
        f"  {figures['accumulation']} micro-batches, remat {figures['remat']}, fsdp "
        f"{figures['fsdp']}, unroll {figures['unroll']}, length {figures['seq_len']}: "
        f"{peak:.2f} GiB, {'fits' if figures['fits'] else 'does not fit'}"
    )


SETTING_COLUMNS: dict[str, Callable[[Figures], object]] = {
    "micro-batches": lambda f: f["accumulation"],
    "remat": lambda f: f["remat"],
    "fsdp": lambda f: f["fsdp"],
    "unroll": lambda f: f["unroll"],
    "length": lambda f: f["seq_len"],
    "peak GiB": lambda f: f"{f['memory_bytes']['peak'] / GIB:.2f}",
    "fits": lambda f: "yes" if f["fits"] else "no",
    "tokens/s": lambda f: f"{f['tokens_per_s']:,.0f}",
    "MFU": lambda f: f"{f['mfu_causal']:.1%}",
}


def settings_table(settings: Sequence[Figures]) -> str:
    return format_table(settings, SETTING_COLUMNS)


CONFIG = '''"""{name} as jaxtrain.plan --fit chose it for {devices} x {chip} with jax {version}.

    jaxtrain train THIS_FILE
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


def write_config(path: str | Path, name: str, figures: Figures) -> None:
    """Writes a config file that applies a setting to configs/NAME.py."""
    write_atomic(Path(path), CONFIG.format(name=name, version=jax.__version__, **figures))
