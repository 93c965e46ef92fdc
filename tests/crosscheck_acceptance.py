"""Counts false and missed verdicts of crosscheck, on correct PyTorch loops and on planted faults.

    python tests/crosscheck_acceptance.py                     all cases
    python tests/crosscheck_acceptance.py --only=muon         the cases whose name contains "muon"
    python tests/crosscheck_acceptance.py --cases=20          20 cases, spread over all
    python tests/crosscheck_acceptance.py --list              names the cases

Each case trains a small model in a PyTorch loop that shares no code with jaxtrain and records it by
crosscheck's Recorder. jaxtrain trains on the recorded batches, and the two traces are compared.

A correct loop must agree. A fault, at its full size, a tenth and a hundredth, must be reported as
different, unless its true effect is below rounding: a second pair of PyTorch runs, in float64, with
and without the fault, differs in no quantity by more than the tolerance of the first comparison.

Results are appended to cases.jsonl in --out; a second start continues after the last one. Exits
nonzero if a correct loop is reported as different, or a fault is missed.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from tests import xla_flags  # noqa: E402

# Verdicts must not depend on how XLA optimises, and compiling takes most of the time. Read by jax.
os.environ.setdefault("XLA_FLAGS", xla_flags.flags(devices=1))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from jaxtrain.config.train_config import DataConfig, OptimConfig, TrainConfig  # noqa: E402
from jaxtrain.crosscheck import jax_train, rounding  # noqa: E402
from jaxtrain.crosscheck.comparison import Comparison, compare_traces  # noqa: E402
from jaxtrain.crosscheck.pretrained import english  # noqa: E402
from jaxtrain.crosscheck.torch_model import build_torch_model  # noqa: E402
from jaxtrain.crosscheck.trace import Trace, batches_of, read_trace  # noqa: E402
from jaxtrain.interop.hf import read_config  # noqa: E402
from jaxtrain.interop.initial_state import load_params  # noqa: E402
from jaxtrain.training.run import Run, build_run  # noqa: E402
from jaxtrain.training.step import TrainState, state_sharding_tree  # noqa: E402
from tests import crosscheck_cases as cases  # noqa: E402
from tests import crosscheck_loops as loops  # noqa: E402
from tests.crosscheck_models import TOKENS, Fault, Setup, Variant, save_start  # noqa: E402

PRECISIONS = "float32", "float64"
COMPILED = 6  # most setups whose compiled programs are in memory at a time
SEED = 7  # of the faults' weights and batches


class Bench:
    """Runs both frameworks on setups, with traces in a folder. Compiles each setup once.

    Use it as a context manager.
    """

    def __init__(self, folder: Path):
        self.folder, self.text = folder, english().encode()
        self._runs: dict[Setup, Run] = {}  # of the last setups
        self._ours: dict[Setup, Trace] = {}  # of the bases of faults
        self._right: dict[Setup, Trace] = {}  # of PyTorch without a fault
        self._functions = BuiltOnce()

    def __enter__(self):
        self._functions.__enter__()
        return self

    def __exit__(self, *_):
        self._functions.close()

    def train_jax(self, setup: Setup, weights: Path, theirs: Trace, style: str) -> Trace:
        """Trains jaxtrain from a Hugging Face folder on a trace's batches; returns its trace."""
        path = self.folder / "ours.jsonl"
        start = self.start(setup, weights)
        jax_train.record(start, setup.steps, path, style, batches_of(theirs))
        return read_trace(path)

    def start(self, setup: Setup, weights: Path) -> jax_train.Start:
        """Builds jaxtrain's start. Only the weights change from one seed of a setup to the next."""
        jax.config.update("jax_enable_x64", setup.precision == "float64")
        if setup not in self._runs:
            if len(self._runs) == COMPILED:
                self._runs.clear()
                self._functions.clear()
            cfg = train_config(setup, weights, self.folder)
            self._runs[setup] = build_run(cfg, jax.devices()[:1])
        run = self._runs[setup]
        model, cfg = run.model, run.cfg.model
        shardings = state_sharding_tree(model, run.optimizer, run.mesh)
        params = load_params(weights, cfg, model.axes, model.shapes, shardings.params)
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(zero, params, run.optimizer.init(params), zero, zero)
        state = jax.device_put(state, shardings)
        return jax_train.Start(run, state, jax.tree.map(np.asarray, params), None)

    def train_torch(
        self, setup: Setup, variant: Variant, weights: Path, fault: Fault = loops.NO_FAULT
    ) -> Trace:
        """Trains the PyTorch loop; returns its trace."""
        path, model = self.folder / "theirs.jsonl", None
        if variant.module == "twin":
            start = self.start(setup, weights)
            model = build_torch_model(start.run.cfg.model, start.weights)
        batches = loops.make_batches(setup, variant, self.text)
        loops.train(setup, variant, weights, batches, path, fault, model)
        return read_trace(path)

    def check_correct(self, case: cases.Correct) -> dict[str, Any]:
        """Compares a correct loop with jaxtrain."""
        setup, variant = case.setup, case.variant
        weights = save_start(setup, variant, self.folder / "weights")
        theirs = self.train_torch(setup, variant, weights)
        style = "jaxtrain" if variant.module == "twin" else "hf"
        row = describe(compare_traces(self.train_jax(setup, weights, theirs, style), theirs))
        return row | {"ok": row["verdict"] == "agree"}

    def check_fault(
        self, planted: cases.Planted, fault: Fault, precisions: Sequence[str] = PRECISIONS
    ) -> dict[str, Any]:
        """Compares a loop with a fault with jaxtrain, and with itself without the fault."""
        base, variant = cases.BASES[planted.base], Variant(seed=SEED)
        weights = save_start(base, variant, self.folder / "weights")
        row: dict[str, Any] = {}
        wide = dataclasses.replace(base, precision="float64", ns_dtype="float64")
        if wide not in self._right:
            self._right[wide] = self.train_torch(wide, variant, weights)
        exact = self._right[wide], self.train_torch(wide, variant, weights, fault)
        effects = sizes_of(compare_traces(*exact))
        for setup in [s for s in (base, wide) if s.precision in precisions]:
            theirs = self.train_torch(setup, variant, weights, fault)
            if setup not in self._ours:
                self._ours[setup] = self.train_jax(setup, weights, theirs, "hf")
            comparison = compare_traces(self._ours[setup], theirs)
            found = describe(comparison)
            limits = {key: d.tolerance for key, d in by_value(comparison).items()}
            visible = {key: size / limits[key] for key, size in effects.items() if limits.get(key)}
            key = max(visible, key=visible.__getitem__)
            found["effect"] = [*key, effects[key], float(limits[key])]
            if comparison.divergence:
                first = comparison.divergence.first
                found["located"] = (comparison.divergence.stage, first.step) == (
                    planted.stage,
                    planted.step,
                ) and planted.tensor in first.tensor
            else:
                found["verdict"] = "missed" if visible[key] > 1 else "below rounding"
            row[setup.precision] = found
        row["ok"] = "missed" not in (row[p]["verdict"] for p in precisions)
        return row


def train_config(setup: Setup, weights: Path, folder: Path) -> TrainConfig:
    """Returns the config with which jaxtrain follows a setup, from a Hugging Face folder."""
    return TrainConfig(
        model=dataclasses.replace(read_config(weights), dtype=setup.precision),
        optim=OptimConfig(
            name=setup.optimizer,
            ns_dtype=setup.ns_dtype,
            ns_form="torch" if setup.ns_dtype == "bfloat16" else "auto",
            learning_rate=loops.MUON_RATE,
            momentum=loops.MOMENTUM,
            adam_learning_rate=setup.rate,
            adam_b1=setup.betas[0],
            adam_b2=setup.betas[1],
            adam_eps=setup.adam_eps,
            weight_decay=setup.weight_decay,
            decay_groups=setup.decays,
            clip_norm=setup.clip,
            clip_eps=setup.clip_eps,
            schedule=setup.schedule,
            warmup_steps=setup.warmup,
            total_steps=setup.steps,
        ),
        data=DataConfig(batch=setup.rows, seq_len=TOKENS),
        accumulation=setup.accumulation,
        steps=setup.steps,
        weights=str(weights),
        workdir=str(folder),
    )


def cache_compiled_programs(folder: Path) -> None:
    """Stores compiled programs, so that a second start need not compile them."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class BuiltOnce(contextlib.ExitStack):
    """Lets crosscheck build, and so compile, each jitted function once for all seeds of a setup.

    jax.jit caches by function, and each recording would build its own.
    """

    def __enter__(self):
        self._built: dict[tuple, Any] = {}
        optimizer = lambda run: id(run.optimizer)
        for module, name, key in (
            (jax_train, "build_traced_step", optimizer),
            (rounding, "build_traced_step", optimizer),
            (rounding, "build_rounding_optimizer", lambda cfg, optimizer, *_: id(optimizer)),
            (rounding, "build_forward_backward_in_other_precision", lambda cfg: cfg),
        ):
            self.enter_context(mock.patch.object(module, name, self._once(module, name, key)))
        return super().__enter__()

    def _once(self, module: Any, name: str, key: Callable[..., Any]) -> Callable[..., Any]:
        build = getattr(module, name)

        def find(*arguments):
            place = name, key(*arguments)
            if place not in self._built:
                self._built[place] = build(*arguments)
            return self._built[place]

        return find

    def clear(self) -> None:
        self._built.clear()


def by_value(comparison: Comparison) -> dict[tuple, Any]:
    """Returns {(step, quantity, tensor): Difference}."""
    found = itertools.chain.from_iterable(comparison.differences.values())
    return {(d.step, d.quantity, d.tensor): d for d in found}


def sizes_of(comparison: Comparison) -> dict[tuple, float]:
    return {key: float(d.size) for key, d in by_value(comparison).items()}


def describe(comparison: Comparison) -> dict[str, Any]:
    """Returns a comparison's verdict, the first difference and the nearest to its tolerance."""
    compared = [d for d in by_value(comparison).values() if d.tolerance]
    worst = max(compared, key=lambda d: d.size / d.tolerance)
    row: dict[str, Any] = {"verdict": "differ" if comparison.divergence else "agree"}
    row["worst"] = [*worst[:3], float(worst.size), float(worst.tolerance)]
    if comparison.divergence:
        first = comparison.divergence.first
        row["stage"] = comparison.divergence.stage
        row["first"] = [*first[:3], float(first.size), float(first.tolerance)]
    return row


def describe_row(row: dict[str, Any]) -> str:
    """Returns a case's result as one line."""
    line = f"{row['case']:45} {row['seconds']:5.1f} s"
    for found in [row[p] for p in PRECISIONS] if "float32" in row else [row]:
        line += f"  {found['verdict']}"
        key = "first" if "first" in found else "worst"
        step, quantity, tensor, size, limit = found[key]
        line += f" (step {step}, {quantity} {tensor} {size:.1e}, tolerance {limit:.1e})"
    return line + ("" if row["ok"] else "  WRONG")


def summary(rows: list[dict[str, Any]]) -> str:
    """Returns the counts of wrong verdicts and the tables of the documentation, in Markdown."""
    correct = [row for row in rows if "verdict" in row]
    planted = [row for row in rows if "verdict" not in row]
    lines = []
    if correct:
        lines += ["| correct loops | seeds and variants | reported as different |", "|---|---|---|"]
        for setup, group in itertools.groupby(correct, lambda row: row["case"].split("/")[0]):
            found = [row["ok"] for row in group]
            lines.append(f"| {setup.partition('-')[2]} | {len(found)} | {found.count(False)} |")
    if planted:
        head = [f"{p}, {size:g}" for p in PRECISIONS for size in cases.SIZES]
        lines += ["", f"| fault, its size | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
        for fault, group in itertools.groupby(planted, lambda row: row["case"].split("*")[0]):
            group = list(group)
            cells = [mark(row[p]) for p in PRECISIONS for row in group]
            lines.append(f"| {fault} | {' | '.join(cells)} |")
    wrong = [row for row in correct if not row["ok"]]
    found = [row[p] for row in planted for p in PRECISIONS]
    verdicts = Counter(row["verdict"] for row in found)
    lines += [
        "",
        f"{len(correct)} correct loops, of which {len(wrong)} were reported as different",
        f"{len(found)} faults: {verdicts['differ']} reported as different, "
        f"{verdicts['below rounding']} below rounding, {verdicts['missed']} missed",
    ]
    return "\n".join(lines)


def mark(found: dict[str, Any]) -> str:
    """Returns a fault's cell: the stage that was named, in brackets if it is not the expected."""
    if found["verdict"] != "differ":
        return found["verdict"]
    return found["stage"] if found["located"] else f"({found['stage']})"


def run_case(bench: Bench, case: Any) -> dict[str, Any]:
    """Runs a case; returns its row of the results."""
    began = time.perf_counter()
    if isinstance(case, cases.Correct):
        row = {"case": case.name} | bench.check_correct(case) | dataclasses.asdict(case.variant)
    else:
        name, planted, fault = case
        row = {"case": name} | bench.check_fault(planted, fault)
    return row | {"seconds": round(time.perf_counter() - began, 2)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python tests/crosscheck_acceptance.py", None, __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--cases", type=int, default=0, help="run this many cases, evenly spread")
    parser.add_argument("--out", default="runs/crosscheck_acceptance", help="folder of the results")
    parser.add_argument("--list", action="store_true", help="print the cases' names and exit")
    args = parser.parse_args(argv)
    everything = {case[0]: case for case in [*cases.correct_loops(), *cases.planted_faults()]}
    names = [name for name in everything if args.only in name]
    if args.cases:
        names = [names[i * len(names) // args.cases] for i in range(min(args.cases, len(names)))]
    if args.list:
        print("\n".join(names))
        return 0
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "cases.jsonl"
    rows = map(json.loads, log.read_text().splitlines() if log.exists() else ())
    done = {row["case"]: row for row in rows}
    cache_compiled_programs(folder / "xla")
    with Bench(folder) as bench, log.open("a") as file:
        for name in [name for name in names if name not in done]:
            done[name] = run_case(bench, everything[name])
            file.write(json.dumps(done[name]) + "\n")
            file.flush()
            print(describe_row(done[name]), flush=True)
    rows = [done[name] for name in names]
    print(summary(rows))
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
