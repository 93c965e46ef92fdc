"""Measures what an exchange between two sites costs in loss: trains pairs of sites on this machine.

    python tests/sites_loss.py --out=FILE --minutes=60    again with the same FILE: continues
    python tests/sites_loss.py --out=FILE --report        prints the tables

Within a table every run sees the same number of tokens: one site with the whole batch ("one"), or
two sites with half of it each. "half" is one site with half of the batch, so with half of the
tokens. A site is a process of `jaxtrain train` on one core. At any time either one pair of sites
trains, or as many runs of one site as there are cores. Model, optimizer and text are those of Muon
in configs/study_transferred.py; nothing of the optimizer is tuned again for two sites, except in
the runs that name a learning rate. The outer rate and momentum are chosen first, by six runs on a
seed of their own. FILE gets a line for each run with its flags and its held-out loss, which must be
equal at both sites; lines with other flags than the current ones are ignored.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from sites_scene import free_ports  # noqa: E402

from jaxtrain.sites.layout import VERSION  # noqa: E402
from jaxtrain.study.statistics import mean_sd, paired_tests  # noqa: E402

STEPS, BATCH = 1500, 32  # 21.2 tokens for each of 289,376 parameters
FLAGS = {
    "steps": STEPS,
    "save_every": STEPS,
    "keep_last": 1,
    "log_every": 50,
    "eval_tokens": 262_144,
    "sample.tokens": 0,
    "model.L": 2,
    "model.D": 96,
    "model.H": 3,
    "model.G": 3,
    "model.K": 32,
    "model.F": 288,
    "data.seq_len": 128,
    "optim.learning_rate": 0.015,
    "optim.momentum": 0.9,
    "optim.adam_learning_rate": 0.04,
    "optim.weight_decay": 0.05,
    "optim.warmup_steps": 50,
}
TUNING_SEED = 11
TUNED = [(rate, momentum) for momentum in (0.0, 0.3, 0.6) for rate in (0.7, 1.0)]
PERIOD = 30
LIMIT_S = 1.2  # seconds per step; a run that takes longer is ended
# {name: flags}; two sites also get the outer rate and momentum that were chosen.
RUNS: dict[str, dict[str, Any]] = {"one": {}, "half": {}}
RUNS |= {f"period {period}": {"sites.period": period} for period in (10, PERIOD, 100)}
RUNS |= {
    f"period {PERIOD}, {codec}": {"sites.period": PERIOD, "sites.codec": codec}
    for codec in ("bf16", "int8", "int4", "int2")
}
RUNS |= {f"period {PERIOD}, 3 fragments": {"sites.period": PERIOD, "sites.fragments": 3}}
# Without grace, every exchange is used exactly 5 or 29 steps later, whichever site is faster. The
# outer step that is best without a delay need not be best with one.
DELAYED = {"sites.period": PERIOD, "sites.delay": 29, "sites.grace": 0}
RUNS |= {f"period {PERIOD}, delay {delay}": DELAYED | {"sites.delay": delay} for delay in (5, 29)}
for rate in (1.0, 0.7):
    own = {"sites.rate": rate, "sites.momentum": 0.0}
    RUNS |= {f"period {PERIOD}, delay 29, rate {rate}, momentum 0.0": DELAYED | own}
RUNS |= {
    f"period {PERIOD}, delay {delay}, blend {blend}": DELAYED
    | {"sites.delay": delay, "sites.blend": blend}
    for delay, blend in ((29, 0.5), (5, 0.5), (29, 0.7))
}
FASTER = {"optim.learning_rate": 0.02}
RUNS |= {f"period {PERIOD}, learning rate 0.02": {"sites.period": PERIOD} | FASTER}
RUNS |= {"learning rate 0.02": FASTER}


class Table(NamedTuple):
    """Runs that are compared with "one": those of some names, for each of the seeds."""

    title: str
    flags: dict[str, Any]  # besides FLAGS
    names: tuple[str, ...]
    seeds: tuple[int, ...]


def steps(number: int) -> dict[str, int]:
    return {"steps": number, "save_every": number}


BIGGER = {"model.D": 128, "model.H": 4, "model.G": 4, "model.F": 384}  # 492,288 parameters
FEW = ("one", f"period {PERIOD}")
TABLES = [
    Table("Five seeds", {}, ("one", "half", FEW[1], f"period {PERIOD}, int4"), (1, 2, 3, 4, 5)),
    Table("All kinds", {}, tuple(RUNS), (1, 2, 3)),
    Table("A quarter of the tokens", steps(STEPS // 4), FEW, (1, 2, 3)),
    Table("Four times the tokens", steps(4 * STEPS), FEW, (1,)),
    Table("492,288 parameters", steps(2400) | BIGGER, FEW, (1, 2, 3)),
    Table("492,288 parameters, four times the tokens", steps(9600) | BIGGER, FEW, (1,)),
]


class Run(NamedTuple):
    """A run: its name, its seed, and its flags besides FLAGS."""

    name: str
    seed: int
    own: dict[str, Any]

    @property
    def two_sites(self) -> bool:
        return any(name.startswith("sites.") for name in self.own)

    @property
    def flags(self) -> dict[str, Any]:
        batch = BATCH // 2 if self.two_sites or self.name == "half" else BATCH
        return FLAGS | {"seed": self.seed, "data.batch": batch} | self.own


def start(folder: Path, core: int, flags: dict[str, Any]) -> subprocess.Popen:
    """Starts a trainer on one of this machine's cores."""
    argv = [sys.executable, "-m", "jaxtrain", "train", "debug", f"--workdir={folder}"]
    with open(f"{folder}.txt", "wb") as output:
        return subprocess.Popen(
            [*argv, *(f"--{name}={value}" for name, value in flags.items())],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=output,
            stderr=output,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )


def start_run(run: Run, folder: Path, cores: list[int]) -> dict[Path, subprocess.Popen]:
    """Starts one trainer, or two that are linked; returns {run directory: its trainer}."""
    if not run.two_sites:
        return {folder / "a": start(folder / "a", cores[0], run.flags)}
    listed = [
        {"name": site, "processes": [{"address": "127.0.0.1", "port": port}]}
        for site, port in zip("ab", free_ports(2), strict=True)
    ]
    key, file = os.urandom(32).hex(), folder / "sites.json"
    file.touch(0o600)
    file.write_text(json.dumps({"version": VERSION, "job": run.name, "key": key, "sites": listed}))
    flags = run.flags | {"sites_file": file}
    return {
        folder / site: start(folder / site, cores[i % len(cores)], flags | {"site": site})
        for i, site in enumerate("ab")
    }


def wait(trainers: list[subprocess.Popen], limit_s: float) -> None:
    """Waits until all have ended; ends the others if one fails, and all after limit_s."""
    start_s = time.monotonic()
    try:
        while any(trainer.poll() is None for trainer in trainers):
            if any(trainer.poll() for trainer in trainers):
                break  # the other site would wait for it
            if time.monotonic() - start_s > limit_s:
                break
            time.sleep(0.5)
    finally:
        for trainer in trainers:
            trainer.kill()


def result(run: Run, started: dict[Path, subprocess.Popen]) -> dict[str, Any]:
    """Returns a run's line for the file, once its trainers have ended."""
    if statuses := [status for trainer in started.values() if (status := trainer.wait())]:
        ends = [Path(f"{path}.txt").read_text()[-1500:] for path in started]
        raise RuntimeError("\n".join([f"{run}: exit status {statuses}", *ends]))
    losses = {json.loads((path / "summary.json").read_text())["eval/loss_nats"] for path in started}
    if len(losses) != 1:
        raise RuntimeError(f"{run}: the sites' held-out losses differ: {sorted(losses)}")
    return {"name": run.name, "seed": run.seed, "loss_nats": losses.pop(), "flags": run.flags}


def train(runs: list[Run], folder: Path) -> list[dict[str, Any]]:
    """Trains one run of two sites, or runs of one site on a core each; returns their lines."""
    cores, start_s = sorted(os.sched_getaffinity(0)), time.monotonic()
    started = []
    for i, run in enumerate(runs):
        (folder / str(i)).mkdir()
        started.append(start_run(run, folder / str(i), cores[i:] + cores[:i]))
    trainers = [trainer for processes in started for trainer in processes.values()]
    wait(trainers, LIMIT_S * max(run.flags["steps"] for run in runs))
    seconds = round(time.monotonic() - start_s)
    rows = [result(run, processes) for run, processes in zip(runs, started, strict=True)]
    return [row | {"seconds": seconds} for row in rows]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def find(rows: list[dict[str, Any]], run: Run) -> float | None:
    """Returns the loss of a run with exactly these flags; None if there is none."""
    same = lambda row: (row["name"], row["flags"]) == (run.name, run.flags)
    return next((row["loss_nats"] for row in rows if same(row)), None)


def tuning_runs() -> list[Run]:
    """Returns the runs that choose the outer rate and momentum."""
    return [
        Run(
            f"outer rate {rate}, momentum {momentum}",
            TUNING_SEED,
            {"sites.period": PERIOD, "sites.rate": rate, "sites.momentum": momentum},
        )
        for rate, momentum in TUNED
    ]


def runs_of(table: Table, rows: list[dict[str, Any]]) -> list[Run]:
    """Returns a table's runs, with the outer step that was best; [] until all have been tried."""
    tried = [(loss, run) for run in tuning_runs() if (loss := find(rows, run)) is not None]
    if len(tried) < len(TUNED):
        return []
    best = min(tried, key=lambda pair: pair[0])[1].own
    runs = []
    for seed in table.seeds:
        for name in table.names:
            run = Run(name, seed, table.flags | RUNS[name])
            runs.append(run._replace(own=best | run.own) if run.two_sites else run)
    return runs


def next_runs(rows: list[dict[str, Any]], cores: int) -> list[Run]:
    """Returns the runs to train next, at the same time: two sites, or one site on each core."""
    runs = tuning_runs() + [run for table in TABLES for run in runs_of(table, rows)]
    waiting: list[Run] = []
    for run in runs:
        if find(rows, run) is None and run not in waiting:
            waiting.append(run)
    if not waiting or waiting[0].two_sites:
        return waiting[:1]
    work = lambda run: (run.two_sites, run.flags["steps"], run.flags["data.batch"])
    alike = (run for run in waiting if work(run) == work(waiting[0]))  # they end together
    return list(itertools.islice(alike, cores))


def format_table(table: Table, rows: list[dict[str, Any]]) -> list[str]:
    """Returns the lines of a table over the seeds whose runs are all there; [] if none are."""
    found = [(run, find(rows, run)) for run in runs_of(table, rows)]
    missing = {run.seed for run, loss in found if loss is None}
    losses: dict[str, list[float]] = {}
    for run, loss in found:
        if loss is not None and run.seed not in missing:
            losses.setdefault(run.name, []).append(loss)
    if not losses:
        return []
    seeds = [seed for seed in table.seeds if seed not in missing]
    lines = ["", f"{table.title}; seeds {seeds}; p is not corrected for the number of rows.", ""]
    lines += ["| run | loss | - one | standard error | p |", "|---|---|---|---|---|"]
    for name, test in paired_tests(losses, "one").items():
        cells = [name, f"{mean_sd(losses[name])[0]:.4f}"]
        shown = [f"{test.difference:+.4f}", f"{test.se:.4f}", f"{test.p:.2g}"]
        known = 0 if name == "one" else 1 if len(seeds) == 1 else 3  # one seed shows no spread
        cells += shown[:known] + [""] * (3 - known)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(rows: list[dict[str, Any]]) -> str:
    """Returns the tables: the choice of the outer step, and each kind of run against "one"."""
    lines = ["| outer step | held-out loss, nats |", "|---|---|"]
    for run in tuning_runs():
        loss = find(rows, run)
        lines.append(f"| {run.name} | {'' if loss is None else f'{loss:.4f}'} |")
    for table in TABLES:
        lines += format_table(table, rows)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a line for each run")
    parser.add_argument("--minutes", type=float, default=60, help="no run starts later")
    parser.add_argument("--report", action="store_true", help="only prints the tables")
    args = parser.parse_args()
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    until_s = time.monotonic() + 60 * args.minutes
    while not args.report and time.monotonic() < until_s:
        if not (chosen := next_runs(read(args.out), len(os.sched_getaffinity(0)))):
            break
        folder = Path(tempfile.mkdtemp(prefix="jaxtrain-sites-loss-"))
        when = {"commit": commit, "date": time.strftime("%Y-%m-%d")}
        lines = [json.dumps(row | when) for row in train(chosen, folder)]
        shutil.rmtree(folder)
        with args.out.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
        print(*lines, sep="\n", flush=True)
    print(report(read(args.out)))


if __name__ == "__main__":
    main()
