r"""Know before you rent: memory, time and collectives of a config on a GPU that is not there.

    jaxtrain plan llama_1400m --chip=a40 --gpus=1
    jaxtrain plan llama_1400m --chip=a40 --fit --write=mine.py
    jaxtrain plan gpt_124m --compare=a40,h100 --price=a40=0.40,h100=2.50

The run's own step is compiled for the chip, down to machine code, on this machine: what is printed
is read from the compiled program. No time is measured: a bound is what the datasheet's peaks allow.
Exit status 1 where the config does not fit. Needs the extra `offline`, and no GPU; --formula needs
neither, and gives memory alone.

Fields of the config (--model.remat=full) are flags here as they are in training.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # chips are compiled for, none is looked for

import jax  # noqa: E402
from absl import flags  # noqa: E402

from jaxtrain.config import train_config as config_lib  # noqa: E402
from jaxtrain.config.command_line import CommandForm  # noqa: E402
from jaxtrain.distributed import memory  # noqa: E402
from jaxtrain.distributed.program import run_main  # noqa: E402
from jaxtrain.ops.precision import resolve_dtype_for_chip  # noqa: E402
from jaxtrain.planning import render, search  # noqa: E402
from jaxtrain.planning.chip_comparison import build_fits_by_formula, compare, table  # noqa: E402
from jaxtrain.planning.compiled import compile_plan  # noqa: E402
from jaxtrain.planning.links import parse_link  # noqa: E402
from jaxtrain.planning.memory_formula import ABSOLUTE_BYTES, RELATIVE, estimate  # noqa: E402
from pallas_kernels.chip import find_chip  # noqa: E402

CACHE = Path("runs/plans")


def links_of(args, chip) -> tuple:
    """(inside a host, between hosts)"""
    return parse_link(args.link, chip), parse_link(args.host_link, chip)


def make_evaluate(cfg, chip, args):
    """(accumulation, remat, **variant) -> figures, from the cache where they are known."""
    links = links_of(args, chip)

    def evaluate(parts, remat, **variant):
        tried = search.with_setting(cfg, parts, remat, **variant)
        return search.figures_of(tried, chip, args.gpus, args.hosts, links, args.cache)

    return evaluate


def variants_of(cfg, args) -> list[dict]:
    """What the fastest setting is tried with too: meshes, two layers a turn, other lengths."""
    devices, tensor = args.gpus * args.hosts, cfg.mesh.tensor
    shares = {max(size // tensor, 1) for size in (devices, args.gpus, 1)}
    found = [{"fsdp": share} for share in sorted(shares, reverse=True)] + [{"unroll": 2}]
    return found + [{"seq_len": length} for length in map(int, args.seq_lens)]


def smallest_change(cfg, chip, args) -> str:
    """Flags of the setting nearest to the config's that fits; smaller parts before more remat."""
    evaluate, devices = make_evaluate(cfg, chip, args), args.gpus * args.hosts
    guess, choices = build_fits_by_formula(cfg, chip, devices), search.accumulations(cfg, devices)
    for remat in search.REMATS[search.REMATS.index(cfg.model.remat) :]:
        likely = [parts for parts in choices if guess(parts, remat)]
        for parts in likely or choices[-1:]:
            found = evaluate(parts, remat)
            if found["fits"]:
                return search.flags_of(found)
    return ""


def plan(cfg, args) -> int:
    """One setting: the page, or with --json its figures."""
    chip = find_chip(args.chip)
    links, found = links_of(args, chip), compile_plan(cfg, chip, args.gpus, args.hosts)
    if args.json:
        print(json.dumps(render.as_dict(found, *links)))
    else:
        print("\n".join(render.lines(found, *links)), flush=True)
        change = "" if found.memory.fits else smallest_change(cfg, chip, args)
        print(render.verdict(found, change))
    return 0 if found.memory.fits else 1


def by_formula(cfg, args) -> int:
    """Memory alone, without the compiler."""
    chip, found = find_chip(args.chip), estimate(cfg, args.gpus * args.hosts)
    usable = memory.fraction() * chip.hbm_bytes
    fits = found.peak <= usable
    if args.json:
        print(json.dumps(found._asdict() | {"peak": found.peak, "fits": fits}))
        return 0 if fits else 1
    for name, size in (found._asdict() | {"peak": found.peak}).items():
        print(f"  {name:26} {size / render.GIB:8.2f} GiB")
    print(
        f"by formula, to {RELATIVE:.0%} of the peak or {ABSOLUTE_BYTES / render.GIB:g} GiB; of "
        f"{usable / render.GIB:.2f} GiB usable: {'fits' if fits else 'does not fit'}"
    )
    return 0 if fits else 1


def find_fastest(cfg, name, args) -> int:
    chip = find_chip(args.chip)
    show = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    show(f"{name} on {args.gpus * args.hosts} x {chip.kind}, each line a compiled step")
    show(search.HEAD)
    evaluate = make_evaluate(cfg, chip, args)
    guess = build_fits_by_formula(cfg, chip, args.gpus * args.hosts)
    devices = args.gpus * args.hosts
    guess, variants = build_fits_by_formula(cfg, chip, devices), variants_of(cfg, args)
    best, *_ = found = search.search_settings(
        cfg, devices, evaluate, show, guess=guess, variants=variants
    )
    if args.json:
        print(json.dumps(found))
    if not best["fits"]:
        sys.exit(f"error: nothing fits {args.gpus * args.hosts} x {chip.name}: raise --gpus.")
    show(f"fastest that fits: {search.flags_of(best)}")
    if args.write:
        search.write_config(args.write, name, best)
        show(f"wrote {args.write}")
    return 0


def main() -> int:
    args = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")
    try:
        return answer(args)
    except RuntimeError as error:  # the compiler is missing
        raise RuntimeError(f"{error} Or set --formula: memory alone, to {RELATIVE:.0%}.") from error


def answer(args) -> int:
    if args.table:
        return table(args, show=print)
    if args.config is None:
        raise ValueError("a config must be named, such as gpt_124m; got none. Or set --table.")
    cfg, name = config_lib.freeze(args.config), Path(flags.FLAGS["config"].config_filename).stem
    if args.compare:
        return compare(cfg, args, show=print)
    cfg = resolve_dtype_for_chip(cfg, find_chip(args.chip))
    if args.formula:
        return by_formula(cfg, args)
    return find_fastest(cfg, name, args) if args.fit else plan(cfg, args)


def define_flags() -> None:
    flags.DEFINE_string("chip", "a40", "a name of the chip table: a40, a100_80gb, h100, h200, ...")
    flags.DEFINE_integer("gpus", 1, "devices on each host", lower_bound=1)
    flags.DEFINE_integer(
        "hosts", 1, "hosts; what crosses them goes over --host_link", lower_bound=1
    )
    flags.DEFINE_string("link", "", "inside a host: pcie4, pcie5, nvlink; default: as it is sold")
    flags.DEFINE_string("host_link", "ethernet10", "between hosts, or as wan:150ms,1gbps")
    flags.DEFINE_bool(
        "fit", False, "search micro-batch, remat, mesh, unroll for the fastest that fits"
    )
    flags.DEFINE_list("seq_lens", [], "with --fit: lengths to try too, at the same tokens a step")
    flags.DEFINE_string("write", "", "with --fit: a config file of what was chosen")
    flags.DEFINE_list("compare", [], "chips side by side, each at its own best setting")
    flags.DEFINE_list("price", [], "of a device and hour, for --compare: a40=0.40,h100=2.50")
    flags.DEFINE_bool("table", False, "all shipped configs on a40 and h100, 1 and 8 devices")
    flags.DEFINE_bool("formula", False, "memory alone, by formula: needs no compiler, takes 1 s")
    flags.DEFINE_bool("json", False, "figures for scripts; seconds, bytes, FLOPs")
    flags.DEFINE_string("cache", str(CACHE), "folder of figures that were compiled before")


def command(argv=None, prog="python -m jaxtrain.plan") -> None:
    form = CommandForm("plan", __doc__, define_flags, config="may")
    run_main(main, (RuntimeError,), form, argv, prog)


if __name__ == "__main__":
    command()
