"""Plans several chips for one config, and every shipped config on a few chips."""

import importlib
from collections.abc import Callable, Sequence

from absl.flags import FlagValues

from jaxtrain.config import train_config as config_lib
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.planning.hardware import Hardware, build_hardware, resolve_for
from jaxtrain.planning.render import GIB
from jaxtrain.planning.search import SETTING_COLUMNS, Figures, search_hardware, stronger_remats
from jaxtrain.reporting.table import format_table
from pallas_kernels.chip import Chip, find_chip

SHIPPED = ("gpt_124m", "gpt_350m", "gpt_774m", "gpt_1558m", "llama_135m", "llama_1400m")
CHIPS, GPU_COUNTS = ("a40", "h100"), (1, 8)


def parse_prices(pairs: Sequence[str]) -> dict[str, float]:
    """Parses ["a40=0.40", ...] into {chip: price of one GPU for one hour}.

    Raises:
        ValueError: an entry is not of the form CHIP=PRICE.
    """
    try:
        prices = {name: float(price) for name, price in (pair.split("=") for pair in pairs)}
    except ValueError:
        raise ValueError(
            f"--price must be of the form a40=0.40,h100=2.50; got {','.join(pairs)}. Set --price."
        ) from None
    return {find_chip(name).name: price for name, price in prices.items()}


def compare_chips(cfg: TrainConfig, args: FlagValues) -> int:
    """Prints a config's speed and price on several chips; returns the exit status."""
    prices, rows = parse_prices(args.price), []
    for chip in map(find_chip, args.compare):
        hardware = build_hardware(chip, args.gpus, args.hosts, args.link, args.host_link)
        rows.append(search_hardware(resolve_for(cfg, hardware), hardware, args.cache)[0])
    first_rate, first_chip = rows[0]["tokens_per_s"], find_chip(rows[0]["chip"])

    def price(figures: Figures) -> str:
        if figures["chip"] not in prices:
            return "no --price"
        hours = 1e9 / figures["tokens_per_s"] / 3_600 * figures["devices"]
        return f"{hours * prices[figures['chip']]:.2f}"

    def speedup_per(figures: Figures, peak: Callable[[Chip], float]) -> str:
        peak_ratio = peak(find_chip(figures["chip"])) / peak(first_chip)
        return f"{figures['tokens_per_s'] / first_rate / peak_ratio:.2f}"

    columns = {
        "chip": lambda f: f["chip"],
        "fits": SETTING_COLUMNS["fits"],
        "tokens/s": SETTING_COLUMNS["tokens/s"],
        "speed-up": lambda f: speedup_per(f, lambda chip: 1.0),
        "per peak FLOP/s": lambda f: speedup_per(f, lambda chip: chip.peak_flops["bfloat16"]),
        "per peak byte/s": lambda f: speedup_per(f, lambda chip: chip.hbm_bytes_per_s),
        "MFU": SETTING_COLUMNS["MFU"],
        "price of 1e9 tokens": price,
        "micro-batches": SETTING_COLUMNS["micro-batches"],
        "remat": SETTING_COLUMNS["remat"],
    }
    print(f"{args.gpus * args.hosts} GPUs of each chip, each at its fastest setting that fits")
    print(format_table(rows, columns))
    print(
        f"The speed-up is over {first_chip.name}; `per peak` divides it by the ratio of the "
        "datasheets' peaks. All times are lower bounds: nothing overlapped, nothing measured."
    )
    return 0 if all(figures["fits"] for figures in rows) else 1


def _setting_with_own_remat(cfg: TrainConfig, hardware: Hardware, cache: str) -> Figures:
    """Returns the fastest setting with the config's remat or, if none fits, the next stronger."""
    figures, cfg = {}, resolve_for(cfg, hardware)
    for remat in stronger_remats(cfg):
        figures = search_hardware(cfg, hardware, cache, remats=(remat,))[0]
        if figures["fits"]:
            break
    return figures


def print_shipped_configs(args: FlagValues) -> int:
    """Prints a Markdown table of every shipped config on each of CHIPS; returns the exit status."""
    print("| config | chip | GPUs | fits | micro-batches | remat | peak GiB | tokens/s | MFU |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in SHIPPED:
        cfg = config_lib.freeze(importlib.import_module(f"configs.{name}").get_config())
        for chip in map(find_chip, CHIPS):
            for gpus in GPU_COUNTS:
                hardware = build_hardware(chip, gpus, args.hosts, args.link, args.host_link)
                f = _setting_with_own_remat(cfg, hardware, args.cache)
                print(
                    f"| {name} | {chip.name} | {gpus} | {'yes' if f['fits'] else 'no'} | "
                    f"{f['accumulation']} | {f['remat']} | "
                    f"{f['memory_bytes']['peak'] / GIB:.1f} | {f['tokens_per_s']:,.0f} | "
                    f"{f['mfu_causal']:.0%} |",
                    flush=True,
                )
    return 0
