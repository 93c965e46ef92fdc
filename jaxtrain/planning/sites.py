"""Plans an exchange between sites for a config: reads the sites, prints a table of codecs."""

import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl.flags import FlagValues

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.model.transformer import build_model
from jaxtrain.model.trees import named_leaves
from jaxtrain.ops.routes import choose_routes
from jaxtrain.planning.hardware import build_hardware, resolve_for
from jaxtrain.planning.render import GIB
from jaxtrain.planning.search import compiled_figures
from jaxtrain.planning.sites_model import (
    Schedule,
    SitesLink,
    blocked_s,
    disk_bytes,
    equal_periods,
    hiding_bytes_per_s,
    nominal_link,
    outer_bytes,
    read_link,
    visible_s,
    waiting_share,
)
from jaxtrain.reporting.table import format_table
from jaxtrain.sites import BLOCK
from jaxtrain.sites.codec import CODECS
from jaxtrain.sites.fragments import split_leaves
from pallas_kernels.chip import find_chip


class Site(NamedTuple):
    """A site to plan for."""

    name: str
    hosts: int
    gpus: int  # on each host
    chip: str  # "" if the inventory does not name it
    step_s: float = 0.0


def read_site(text: str, name: str) -> Site:
    """Returns the site that an entry of --sites describes.

    Args:
        text: an inventory, of which `python -m launch.run --sites` checks every field, or
            GPUSxCHIP or HOSTSxGPUSxCHIP.
        name: of a site that is not an inventory.

    Raises:
        ValueError: the text is neither.
    """
    if match := re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x([A-Za-z]\w*)", text):
        hosts, gpus, chip = match.groups()
        return Site(name, int(hosts or 1), int(gpus), chip)
    try:
        content = tomllib.loads(Path(text).read_text(encoding="utf-8-sig"))
        hosts = [content.get("defaults", {}) | host for host in content["hosts"]]
        first = hosts[0]
        gpus, chip = int(first.get("gpus", 0)), str(first.get("chip", ""))
        return Site(str(first.get("site") or Path(text).stem), len(hosts), gpus, chip)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            "--sites must list inventories or sites such as 8xa40 or 2x8xh100 (hosts x GPUs x "
            f"chip); got {text}: {type(error).__name__}: {error}."
        ) from None


def _find_step_seconds(cfg: TrainConfig, sites: Sequence[Site], args: FlagValues) -> list[float]:
    """Returns the seconds of a step at each site: those of --step_s, or compiled lower bounds."""
    if not args.step_s:
        return [_compile_step_seconds(cfg, site, args) for site in sites]
    texts = args.step_s * (len(sites) if len(args.step_s) == 1 else 1)
    try:
        values = [float(text) for text in texts]
    except ValueError:
        values = []
    if len(values) != len(sites) or not all(0 < value < math.inf for value in values):
        raise ValueError(
            f"--step_s must be positive seconds, for all sites or for each of the {len(sites)}; "
            f"got {','.join(args.step_s)}."
        )
    return values


def _compile_step_seconds(cfg: TrainConfig, site: Site, args: FlagValues) -> float:
    if not site.chip or not site.gpus:
        raise ValueError(
            f"the inventory of {site.name} must have chip and gpus; got chip {site.chip!r}, gpus "
            f"{site.gpus}. Or set --step_s to the seconds of a step."
        )
    chip = find_chip(site.chip)
    hardware = build_hardware(chip, site.gpus, site.hosts, args.link, args.host_link)
    return compiled_figures(resolve_for(cfg, hardware), hardware, args.cache)["step_s"]


def plan_sites(cfg: TrainConfig, args: FlagValues) -> int:
    """Prints the plan of --sites; returns the exit status.

    Raises:
        ValueError: a flag is missing or invalid.
    """
    period, fragments = cfg.sites.period, cfg.sites.fragments
    if period < 1:
        raise ValueError(f"--sites needs a period; got sites.period={period}. Set --sites.period.")
    if len(args.sites) < 2:
        raise ValueError(f"--sites must list at least two sites; got {','.join(args.sites)}.")
    link = read_link(args.network) if args.network else None
    link = link or nominal_link(args.link_mbit, args.link_rtt_ms)
    sites = [read_site(text, f"site_{i + 1}") for i, text in enumerate(args.sites)]
    sites = [
        site._replace(step_s=seconds)
        for site, seconds in zip(sites, _find_step_seconds(cfg, sites, args), strict=True)
    ]

    # Shapes do not depend on which implementation of an op runs, so the CPU's routes will do.
    model = build_model(cfg.model, choose_routes(cfg.model, False, "cpu", False))
    shapes = {path: leaf.shape for path, leaf in named_leaves(model.shapes).items()}
    parts = split_leaves(shapes, fragments)
    parameters = sum(part.elements for part in parts)
    # By default the longest delay: until the next fragment's exchange starts.
    delay = cfg.sites.delay or min(period - 1, period // fragments)
    shares = [part.elements / parameters for part in parts]
    schedule = Schedule(period, delay, shares, cfg.sites.blend > 0)
    sizes = {
        name: sum(codec.code_bytes(part.blocks * BLOCK) for part in parts)
        for name, codec in CODECS.items()
    }
    rows = codec_rows(sites, schedule, link, parameters, sizes)
    for row in rows:
        args_of = row["round_bytes"], len(sites), period, cfg.save_every, cfg.keep_last
        row["disk_bytes"] = [disk_bytes(*args_of) / site.hosts for site in sites]
    if args.json:
        found = {"sites": [site._asdict() for site in sites], "link": link._asdict()}
        print(json.dumps(found | {"parameters": parameters, "delay": delay, "codecs": rows}))
    else:
        print(describe(sites, schedule, link, parameters, rows))
        if not args.step_s:
            print("The seconds of a step are lower bounds; --step_s gives measured ones.")
    return 0


def codec_rows(
    sites: Sequence[Site],
    schedule: Schedule,
    link: SitesLink,
    parameters: int,
    code_bytes_of: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Returns a row of figures for each codec: bytes, seconds, shares of the time from 0 to 1.

    Args:
        schedule: its delay is that of the columns `hidden`.
        code_bytes_of: {codec: bytes of the whole model's code}.
    """
    step_s, periods = [site.step_s for site in sites], [schedule.period] * len(sites)
    rows = []
    for codec, code_bytes in code_bytes_of.items():
        waited_s = blocked_s(code_bytes, schedule, link)
        late_s = visible_s(code_bytes, schedule, link, max(step_s))
        rate = hiding_bytes_per_s(code_bytes, schedule, link.round_trip_s, max(step_s))
        lossless = CODECS[codec].lossless
        memory = outer_bytes(parameters, schedule, code_bytes, len(sites), lossless)
        row = {
            "codec": codec,
            "round_bytes": code_bytes,
            "exchange_s": waited_s,
            "blocking": waiting_share(step_s, periods, waited_s),
            "hidden": waiting_share(step_s, periods, late_s),
            "hiding_bytes_per_s": rate if math.isfinite(rate) else None,
            "host_bytes": [memory / site.hosts for site in sites],
        }
        rows.append(row)
    return rows


def describe(
    sites: Sequence[Site],
    schedule: Schedule,
    link: SitesLink,
    parameters: int,
    rows: Sequence[Mapping[str, Any]],
) -> str:
    """Returns the plan as text; a cell with several numbers has one for each site, in order."""
    lines = [f"{parameters:,} parameters; link {link.source}"]
    for site in sites:
        chips = f"{site.hosts} x {site.gpus} x {site.chip}, " if site.chip else ""
        lines.append(
            f"  {site.name}: {chips}a step of {site.step_s:.3g} s, {schedule.period} steps a "
            f"round, {schedule.period * site.step_s:,.0f} s"
        )
    steps_s, fragments = [site.step_s for site in sites], len(schedule.fragments)
    equal = equal_periods(steps_s, schedule.period, fragments)
    if max(equal) > 1.05 * min(equal):
        pairs = ", ".join(f"{site.name} {n}" for site, n in zip(sites, equal, strict=True))
        lines.append(
            "  Each site waits for the slowest. Rounds of equal length need --sites.period, and "
            f"--steps in the same ratio: {pairs}"
        )
    join = lambda values, form: " / ".join(format(value, form) for value in values)
    rate = lambda row: row["hiding_bytes_per_s"]
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "codec": lambda row: row["codec"],
        "MB a round": lambda row: f"{row['round_bytes'] / 1e6:,.1f}",
        "seconds": lambda row: f"{row['exchange_s']:,.1f}",
        "computing, delay 0": lambda row: join(row["blocking"], ".0%"),
        f"computing, delay {schedule.delay}": lambda row: join(row["hidden"], ".0%"),
        "hidden from Mbit/s": lambda row: f"{rate(row) * 8e-6:,.0f}" if rate(row) else "none",
        "GiB of memory": lambda row: join((b / GIB for b in row["host_bytes"]), ".2f"),
        "GiB of disk": lambda row: join((b / GIB for b in row["disk_bytes"]), ".2f"),
    }
    lines.append(format_table(rows, columns))
    lines.append(
        "`seconds`: of a round of all fragments. `hidden from`: the payload in each direction with "
        f"which an exchange takes {schedule.delay} steps. `memory`, `disk`: of each host, for the "
        "outer state and for codes."
    )
    return "\n".join(lines)
