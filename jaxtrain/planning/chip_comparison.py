"""Many plans side by side: chips for one config, and all shipped configs."""

import importlib

from jaxtrain.config import train_config as config_lib
from jaxtrain.distributed import memory
from jaxtrain.ops.precision import resolve_dtype_for_chip
from jaxtrain.planning import search
from jaxtrain.planning.links import parse_link
from jaxtrain.planning.memory_formula import estimate
from jaxtrain.planning.render import GIB
from pallas_kernels.chip import find_chip

SHIPPED = ("gpt_124m", "gpt_350m", "gpt_774m", "gpt_1558m", "llama_135m", "llama_1400m")
CHIPS, COUNTS = ("a40", "h100"), (1, 8)


def build_fits_by_formula(cfg, chip, devices):
    """(accumulation, remat) -> whether it fits by formula."""

    def guess(parts, remat):
        peak = estimate(search.with_setting(cfg, parts, remat), devices).peak
        return peak <= memory.fraction() * chip.hbm_bytes

    return guess


def best_setting(cfg, chip, gpus, args, remats=search.REMATS) -> dict:
    """Figures of the fastest setting that fits, or, where none does, of the smallest."""
    links = parse_link(args.link, chip), parse_link(args.host_link, chip)

    def evaluate(parts, remat):
        tried = search.with_setting(cfg, parts, remat)
        return search.figures_of(tried, chip, gpus, args.hosts, links, args.cache)

    devices = gpus * args.hosts
    guess = build_fits_by_formula(cfg, chip, devices)
    return search.search_settings(cfg, devices, evaluate, lambda text: None, remats, guess)[0]


def first_that_fits(cfg, chip, gpus, args) -> dict:
    """best_setting of the config's own remat, or of the first stronger one that fits."""
    for remat in search.REMATS[search.REMATS.index(cfg.model.remat) :]:
        found = best_setting(cfg, chip, gpus, args, (remat,))
        if found["fits"]:
            break
    return found


def parse_prices(pairs) -> dict[str, float]:
    """{chip: price of a device and hour}.

    Raises:
        ValueError: an entry is not CHIP=PRICE.
    """
    try:
        found = {name: float(price) for name, price in (pair.split("=") for pair in pairs)}
    except ValueError:
        raise ValueError(
            f"--price must be as a40=0.40,h100=2.50; got {','.join(pairs)}. Set --price."
        ) from None
    return {find_chip(name).name: price for name, price in found.items()}


def compare(cfg, args, show=print) -> int:
    """The same work on several chips: raw, and by what each chip could do."""
    prices, rows = parse_prices(args.price), []
    show(f"{args.gpus * args.hosts} device(s) of each chip, each at its fastest setting that fits")
    for name in args.compare:
        chip = find_chip(name)
        rows.append((chip, best_setting(resolve_dtype_for_chip(cfg, chip), chip, args.gpus, args)))
    show(
        f"{'chip':10} {'fits':>4} {'tokens/s':>10} {'ratio':>6} {'per FLOP/s':>10} {'per B/s':>8} "
        f"{'MFU':>6} {'price of 1e9 tokens':>20}  setting"
    )
    first = rows[0]
    for chip, figures in rows:
        ratio = figures["tokens_per_s"] / first[1]["tokens_per_s"]
        compute = chip.peak_flops["bfloat16"] / first[0].peak_flops["bfloat16"]
        memory = chip.hbm_bytes_per_s / first[0].hbm_bytes_per_s
        hours = 1e9 / figures["tokens_per_s"] / 3_600 * figures["devices"]
        cost = (
            f"{hours * prices[chip.name]:20.2f}" if chip.name in prices else f"{'no --price':>20}"
        )
        show(
            f"{chip.name:10} {'yes' if figures['fits'] else 'no':>4} "
            f"{figures['tokens_per_s']:10,.0f} {ratio:6.2f} {ratio / compute:10.2f} "
            f"{ratio / memory:8.2f} {figures['mfu_causal']:6.1%} {cost}  "
            f"{figures['accumulation']} parts, remat {figures['remat']}"
        )
    show("bounds by the datasheets' peaks, nothing overlapped; ratios are to the first chip")
    return 0 if all(figures["fits"] for _, figures in rows) else 1


def table(args, show=print) -> int:
    """Markdown: every shipped config on each chip, the micro-batch that is fastest and fits."""
    show("| config | chip | devices | fits | parts | remat | peak GiB | bound, tokens/s | MFU |")
    show("|---|---|---|---|---|---|---|---|---|")
    for name in SHIPPED:
        config = importlib.import_module(f"configs.{name}").get_config()
        cfg = config_lib.freeze(config)
        for chip in map(find_chip, CHIPS):
            for gpus in COUNTS:
                f = first_that_fits(cfg, chip, gpus, args)
                show(
                    f"| {name} | {chip.name} | {gpus} | {'yes' if f['fits'] else 'no'} | "
                    f"{f['accumulation']} | {f['remat']} | "
                    f"{f['memory_bytes']['peak'] / GIB:.1f} | {f['tokens_per_s']:,.0f} | "
                    f"{f['mfu_causal']:.0%} |",
                    flush=True,
                )
    return 0
