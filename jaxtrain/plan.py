r"""Predicts memory, time and communication of a training step on GPUs that you do not have yet.

    jaxtrain plan llama_1400m --chip=a40 --gpus=1
    jaxtrain plan llama_1400m --chip=a40 --fit --write=mine.py
    jaxtrain plan gpt_124m --compare=a40,h100 --price=a40=0.40,h100=2.50
    jaxtrain plan gpt_124m --chip=h100 --calibrated=DIR/calibration.json
    jaxtrain plan llama_1400m --sites=8xa40,8xa40 --sites.period=30 --link_mbit=100

The first command compiles the step of a config for the chip, on this machine, and reads the
compiled program; with data.mixture it also prints how often the run reads each source. The second
one searches for the fastest setting that fits and writes it as a config. The third one compares
chips. The fourth one also predicts the time, with efficiencies that `jaxtrain bench
--suite=first-day --out=DIR` measured on such a chip. The fifth one predicts what the exchange
between sites costs, with every codec (docs/sites.md). Fields of the config (--model.remat=full) are
flags, as in training.

How to read the output:
    memory            bytes on one device, by use; the step fits if its peak is at most `usable`
    tokens/s          an upper bound: every instruction at the datasheet's peak, nothing overlapped
    MFU               model FLOPs at that bound, as a share of the chip's bfloat16 peak
    payload           bytes of the arrays that one device gathers, reduces or sends in a step
    micro-batches     parts into which a device's rows are cut (--accumulation)
    fsdp, unroll      --mesh.fsdp and --model.unroll
    speed-up          with --compare: relative to the first chip. `per peak FLOP/s` and `per peak
                      byte/s` divide it by the ratio of the two chips' datasheet peaks

With --data.batch_schedule the plan is that of the largest size, with a table of all sizes; --fit
and --compare plan steps of data.batch sequences.

Without --calibrated no figure is measured. The exit status is 1 if the config does not fit.
Compiling needs the extra `offline` but no GPU; --formula needs neither and estimates only memory.
"""

import functools
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # so that jax does not look for GPUs when it is imported

import jax  # noqa: E402
from absl import flags  # noqa: E402

from jaxtrain.config import train_config as config_lib  # noqa: E402
from jaxtrain.config.command_line import CommandForm  # noqa: E402
from jaxtrain.config.train_config import TrainConfig  # noqa: E402
from jaxtrain.distributed.program import run_main  # noqa: E402
from jaxtrain.ops.precision import resolve_dtype_for_chip  # noqa: E402
from jaxtrain.planning import render, search  # noqa: E402
from jaxtrain.planning.calibration import read_calibration  # noqa: E402
from jaxtrain.planning.chip_comparison import compare_chips, print_shipped_configs  # noqa: E402
from jaxtrain.planning.compiled import compile_plan  # noqa: E402
from jaxtrain.planning.hardware import (  # noqa: E402
    Hardware,
    build_hardware,
    resolve_for,
    resolve_remat_for,
)
from jaxtrain.planning.mixture import mixture_text, plan_mixture  # noqa: E402
from jaxtrain.planning.sites import plan_sites  # noqa: E402
from jaxtrain.training import memory_formula  # noqa: E402
from jaxtrain.training.programs import size_config  # noqa: E402
from pallas_kernels.chip import find_chip  # noqa: E402

CACHE = Path("runs/plans")


def variants_to_try(cfg: TrainConfig, args: flags.FlagValues) -> list[dict[str, int]]:
    """Returns what --fit also tries on the fastest setting: meshes, unroll=2, --seq_lens."""
    devices, tensor = args.gpus * args.hosts, cfg.mesh.tensor
    shares = {max(size // tensor, 1) for size in (devices, args.gpus, 1)}
    meshes = [{"fsdp": share} for share in sorted(shares, reverse=True)]
    return [*meshes, {"unroll": 2}, *({"seq_len": int(length)} for length in args.seq_lens)]


def smallest_change(cfg: TrainConfig, hardware: Hardware, cache: str) -> str:
    """Returns flags that make a config fit: more micro-batches, then more remat; "" if none do."""
    choices, cfg = search.accumulations(cfg, hardware.devices), resolve_for(cfg, hardware)
    for remat in search.stronger_remats(cfg):
        likely = [n for n in choices if search.fits_by_formula(cfg, hardware, n, remat)]
        for count in likely or choices[-1:]:
            figures = search.evaluate_setting(cfg, hardware, cache, count, remat)
            if figures["fits"]:
                return search.setting_flags(figures)
    return ""


def print_plan(cfg: TrainConfig, hardware: Hardware, args: flags.FlagValues) -> int:
    """Compiles one setting and prints its plan; returns the exit status."""
    calibration = read_calibration(args.calibrated, hardware.chip) if args.calibrated else None
    mixture = _mixture_figures(cfg)  # before the compilation, as it may refuse the config
    sizes = sorted({phase.sequences for phase in cfg.data.sizes.phases}, reverse=True)
    plans = [compile_plan(size_config(cfg, size), hardware) for size in sizes]
    plan = plans[0]
    if args.json:
        figures = render.plan_dict(plan)
        if cfg.data.batch_schedule:
            figures["sizes"] = render.sizes_dict(plans)
        if calibration:
            figures["calibrated"] = render.calibrated_dict(plan, calibration)
        figures |= mixture
        print(json.dumps(figures))
    else:
        print("\n".join(render.plan_lines(plan)), flush=True)
        if cfg.data.batch_schedule:
            print("\n".join(render.sizes_lines(plans)))
        if calibration:
            print(render.calibrated_line(plan, calibration))
        if mixture:
            print(mixture_text(mixture["mixture"], cfg.steps))
        change = "" if plan.memory.fits else smallest_change(cfg, hardware, args.cache)
        print(render.fit_verdict(plan, change))
    return 0 if plan.memory.fits else 1


def _mixture_figures(cfg: TrainConfig) -> dict[str, dict]:
    rows = plan_mixture(cfg)
    return {"mixture": rows} if rows else {}


def print_estimate(cfg: TrainConfig, hardware: Hardware, args: flags.FlagValues) -> int:
    """Prints the memory by formula; returns the exit status."""
    cfg, reason = resolve_remat_for(cfg, hardware)
    estimate = memory_formula.estimate_memory(cfg, hardware.devices)
    fits = estimate.peak <= hardware.usable_bytes
    sizes, mixture = estimate._asdict() | {"peak": estimate.peak}, _mixture_figures(cfg)
    if args.json:
        print(json.dumps(sizes | {"fits": fits, "remat": cfg.model.remat} | mixture))
    else:
        print(f"remat {cfg.model.remat}" + (f", {reason}" if reason else ""))
        print(render.memory_table(sizes | {"usable": hardware.usable_bytes}))
        print(
            f"{'Fits' if fits else 'Does not fit'}, by formula: right to "
            f"{memory_formula.RELATIVE_ERROR:.0%} of the peak or "
            f"{memory_formula.ABSOLUTE_ERROR_BYTES / render.GIB:g} GiB, whichever is more."
        )
        if mixture:
            print(mixture_text(mixture["mixture"], cfg.steps))
    return 0 if fits else 1


def print_fastest(cfg: TrainConfig, name: str, hardware: Hardware, args: flags.FlagValues) -> int:
    """Searches for the fastest setting that fits, prints it and writes it to --write."""
    show = (lambda text: None) if args.json else functools.partial(print, flush=True)
    devices, chip = hardware.devices, hardware.chip
    show(f"{name} on {devices} x {chip.kind}; each line is a setting that was compiled")
    variants = variants_to_try(cfg, args)
    settings = search.search_hardware(cfg, hardware, args.cache, show, variants=variants)
    best = settings[0]
    if args.json:
        print(json.dumps(settings))
    show(search.settings_table(settings))
    if not best["fits"]:
        sys.exit(f"error: no setting fits {devices} x {chip.name}: raise --gpus.")
    show(f"Fastest setting that fits: {search.setting_flags(best)}")
    if args.write:
        search.write_config(args.write, name, best)
        show(f"Wrote {args.write}")
    return 0


def main() -> int:
    jax.config.update("jax_platforms", "cpu")
    try:
        return run_command(flags.FLAGS)
    except RuntimeError as error:  # the compiler for GPUs is missing
        raise RuntimeError(
            f"{error} Or set --formula, which estimates the memory only, to within "
            f"{memory_formula.RELATIVE_ERROR:.0%}."
        ) from error


def run_command(args: flags.FlagValues) -> int:
    """Runs the plan, search or comparison that the flags ask for; returns the exit status."""
    for name in ("table", "compare", "formula", "fit", "sites") if args.calibrated else ():
        if getattr(args, name):
            raise ValueError(f"--calibrated is for the plan of one setting; got --{name} too.")
    if args.table:
        return print_shipped_configs(args)
    if args.config is None:
        raise ValueError("a config must be named, such as gpt_124m; got none. Or set --table.")
    cfg = config_lib.freeze(args.config)
    if args.compare:
        return compare_chips(cfg, args)
    if args.sites:
        return plan_sites(cfg, args)
    chip = find_chip(args.chip)
    cfg = resolve_dtype_for_chip(cfg, chip)
    hardware = build_hardware(chip, args.gpus, args.hosts, args.link, args.host_link)
    if args.formula:
        return print_estimate(cfg, hardware, args)
    if args.fit:
        # The command line stores the config's path in this attribute.
        path = args["config"].config_filename  # pyright: ignore[reportAttributeAccessIssue]
        name = Path(path).stem
        return print_fastest(cfg, name, hardware, args)
    return print_plan(cfg, hardware, args)


def define_flags() -> None:
    flags.DEFINE_string("chip", "a40", "a name of the chip table: a40, a100_80gb, h100, h200, ...")
    flags.DEFINE_integer("gpus", 1, "GPUs on each host", lower_bound=1)
    flags.DEFINE_integer("hosts", 1, "number of hosts", lower_bound=1)
    flags.DEFINE_string("link", "", "between a host's GPUs: pcie4, pcie5, nvlink; default: by chip")
    flags.DEFINE_string("host_link", "ethernet10", "between hosts: a name, or wan:150ms,1gbps")
    flags.DEFINE_bool("fit", False, "find the fastest micro-batch, remat, mesh and unroll that fit")
    flags.DEFINE_list("seq_lens", [], "with --fit: also try these lengths, at equal tokens a step")
    flags.DEFINE_string("write", "", "with --fit: write the fastest setting to this config file")
    flags.DEFINE_list("compare", [], "compare these chips, each at its fastest setting that fits")
    flags.DEFINE_list("price", [], "with --compare: price of a GPU and hour, as a40=0.40,h100=2.50")
    flags.DEFINE_bool("table", False, "plan all shipped configs on A40 and H100, as Markdown")
    flags.DEFINE_bool("formula", False, "estimate the memory by a formula, in a second")
    text = "predict the time with the efficiencies in this calibration.json of suite first-day"
    flags.DEFINE_string("calibrated", "", text)
    text = "plan an exchange between sites: inventories, or 8xa40, 2x8xh100 (hosts x GPUs x chip)"
    flags.DEFINE_list("sites", [], text)
    flags.DEFINE_string("network", "", "with --sites: what launch.probe --sites measured")
    flags.DEFINE_float("link_mbit", 1_000.0, "with --sites: nominal Mbit/s between two sites")
    flags.DEFINE_float("link_rtt_ms", 150.0, "with --sites: round trip between two sites")
    flags.DEFINE_list("step_s", [], "with --sites: measured seconds of a step, one for each site")
    flags.DEFINE_bool("json", False, "print JSON; seconds, bytes, FLOPs")
    flags.DEFINE_string("cache", str(CACHE), "folder that stores compiled figures")


def command(argv: list[str] | None = None, prog: str = "python -m jaxtrain.plan") -> None:
    form = CommandForm("plan", __doc__ or "", define_flags, config="may")
    run_main(main, (RuntimeError,), form, argv, prog)


if __name__ == "__main__":
    command()
