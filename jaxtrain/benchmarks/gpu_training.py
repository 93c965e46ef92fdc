"""Suite gpu: our training step at 124M to 1.4B against compiled PyTorch, on one GPU.

A child process measures each row, so that the frameworks never hold memory at the same time, and a
crash becomes a row with its reason. This process does not use the GPU. It measures the most
valuable rows first and lists those for which no time is left. Both frameworks train the same tokens
per step (the config's, or fewer if a step would take longer than STEP_S), each in its fastest
micro-batch size. With --resume it keeps the rows of an earlier call and their compile caches.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain.benchmarks.batch_size import (
    STEP_S,
    first_rows,
    fitting_batch,
    halve_until_it_fits,
    like_torch,
)
from jaxtrain.benchmarks.child import BenchJob, job_config, run_child
from jaxtrain.benchmarks.gpu_results import (
    TORCH_OPTIMIZERS,
    Item,
    ratio_row,
    stamp,
    step_shares,
    target_verdicts,
)
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.distributed import memory
from jaxtrain.metrics.flops import training_flops
from jaxtrain.ops import tuning
from jaxtrain.ops.tuning import TuningChoice
from jaxtrain.planning.memory_formula import estimate_memory
from pallas_kernels.chip import Chip, chip_of_kind
from pallas_kernels.quiet import has_gpu

SIZES = ("gpt_124m", "gpt_350m", "gpt_774m", "llama_1400m")
OPTIMIZERS = ("muon", "adamw", "accelerated_lmo")
VARIANTS = ("jaxtrain", "pytorch")
CHILD_MODULES = {"jaxtrain": "jax_child", "pytorch": "torch_child"}
CHILD_ENV = memory.environment()  # which training sets for itself
TORCH_CACHES = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"

# Estimates, used only to plan the minutes, of the time that a child takes before its steps.
START_S, COMPILE_S, TORCH_COMPILE_LAYER_S = 20.0, 40.0, 2.0
ROW_LIMIT_S = 400.0  # a child that takes longer is killed, so that it costs one row only
DEFAULT_MICRO_BATCH_TOKENS = 32_768


class NoGpu(ValueError):
    """A suite that needs a GPU was started on a machine without one."""


def check_gpu(tiny: bool) -> None:
    """Raises NoGpu if there is no GPU and --tiny was not given."""
    if not tiny and not has_gpu():
        raise NoGpu(
            "suites gpu and judge need a GPU, as their figures mean nothing elsewhere; got none. "
            "Set --tiny to try their path on this processor."
        )


def build_items(
    sizes: Sequence[str],
    optimizers: Sequence[str],
    variants: Sequence[str],
    choices: Sequence[TuningChoice] = (),
) -> list[Item]:
    """Returns all rows to measure, the most valuable first: Muon at each size in both frameworks.

    Args:
        choices: XLA options among them that are not applied yet are tried at the first size.
    """
    items = [
        Item(size, variant, optimizer)
        for optimizer, size, variant in itertools.product(optimizers, sizes, variants)
        if variant == "jaxtrain" or optimizer in TORCH_OPTIMIZERS
    ]
    if "jaxtrain" in variants:
        items.append(Item(sizes[-1], "jaxtrain", optimizers[0], "warm start"))
        untried = [choice for choice in choices if choice.is_option and not choice.applied]
        items += [Item(sizes[0], "jaxtrain", optimizers[0], choice.name) for choice in untried]
    return items


class GpuSuite:
    """One run of the suite: the device, the deadline, and the micro-batch sizes found so far."""

    def __init__(
        self, args: argparse.Namespace, folder: Path, finished: Sequence[dict[str, Any]] = ()
    ):
        self._args, self._folder, self._finished = args, folder, finished
        self._best_rows: dict[tuple[str, str], int] = {}  # by size and variant
        self._taken_s: dict[tuple[str, str], float] = {}
        self._deadline_s = time.monotonic() + 60 * args.minutes
        self.chip: Chip | None = None
        self._device: dict[str, Any] = {}

    @property
    def _left_s(self) -> float:
        return self._deadline_s - time.monotonic()

    @property
    def chip_name(self) -> str:
        return self.chip.name if self.chip else ""

    def _run_child(self, variant: str, job: BenchJob) -> dict[str, Any]:
        # torch gets a new cache for each run of the suite, as JAX does: in its usual cache it
        # would find what an earlier run compiled.
        caches = {name: f"{job.cache}/{name}" for name in TORCH_CACHES}
        limit_s = min(max(self._left_s, 1.0), ROW_LIMIT_S)
        env = CHILD_ENV | caches
        result = run_child(CHILD_MODULES[variant], job, self._folder, limit_s, env)
        if result.pop("timed_out", False) and limit_s < ROW_LIMIT_S:
            result["unfinished"] = True  # the suite's time was up: the next call measures it again
        return result

    def measure_device(self) -> dict[str, Any]:
        """Returns the row with the device and its ceilings; measures them if no row has them."""
        known = [row for row in self._finished if row.get("device")]
        job = BenchJob("about", tiny=self._args.tiny)
        self._device = known[0] if known else self._run_child("jaxtrain", job)
        self.chip = chip_of_kind(self._device.get("device", ""))
        return {"suite": "gpu", "case": "ceilings", **self._device}

    def _build_job(self, item: Item) -> tuple[BenchJob, TrainConfig]:
        """Returns an item's job without its micro-batch size, and its config."""
        args = self._args
        tried = [c for c in tuning.choices_for(self.chip_name) if c.name == item.what]
        trace = f"{args.trace}/{item}".replace(" ", "_") if args.trace else ""
        job = BenchJob(
            "train",
            item.size,
            item.optimizer,
            most_s=0.0 if args.tiny else args.seconds,
            tiny=args.tiny,
            usable_bytes=self._device.get("bytes_limit", 0),
            cache=str(self._cache(item)),
            trace=trace if item.what == "step" else "",
            options={choice.name: choice.value for choice in tried},
        )
        cfg = job_config(job)
        # On a known chip the datasheet's peak, so that the tokens of a step are always the same.
        peak = self.chip.peak_flops["bfloat16"] if self.chip else self._device["matmul_flops_per_s"]
        batch = fitting_batch(cfg, peak)
        data = dataclasses.replace(cfg.data, batch=batch)
        cfg = dataclasses.replace(cfg, accumulation=1, data=data)
        return dataclasses.replace(job, batch=batch), cfg

    def _cache(self, item: Item) -> Path:
        """Returns the folder for what both frameworks compile for an item."""
        return self._folder / item.size / item.variant

    def _known_rows(self, item: Item) -> list[dict[str, Any]]:
        """Returns an item's rows of an earlier call: the first one, and that at half its size."""
        names = f"{item.size} {item.optimizer}", item.variant, item.what
        keys = "case", "variant", "what"
        return [row for row in self._finished if tuple(row.get(key) for key in keys) == names]

    def measure(self, item: Item) -> Iterator[dict[str, Any]]:
        """Yields an item's row and, the first time for a size, one at half the micro-batch size.

        Rows of an earlier call are not measured again, and not yielded.
        """
        job, cfg = self._build_job(item)
        key, known = (item.size, item.variant), self._known_rows(item)
        memory_cfg = cfg if item.variant == "jaxtrain" else like_torch(cfg)
        torch_s = TORCH_COMPILE_LAYER_S * cfg.model.L if item.variant == "pytorch" else 0.0
        guess_s = START_S + COMPILE_S + torch_s + self._args.seconds + 4 * STEP_S
        expected_s = self._taken_s.get(key, 0.0 if self._args.tiny else guess_s)

        def attempt(rows: int) -> dict[str, Any]:
            return self._run_child(item.variant, dataclasses.replace(job, rows=rows))

        def not_measured() -> dict[str, Any]:
            reason = f"it would take about {expected_s:.0f} s; {self._left_s:.0f} s are left"
            return {"error": f"not measured: {reason}", "unfinished": True}

        if known:
            result, rows = known[0], known[0]["rows"]
        elif self._left_s < expected_s:
            yield self._row(item, cfg, 0, not_measured())
            return
        elif self._args.rows > job.batch:
            error = f"--rows must be at most {job.batch}, the sequences of a step; got "
            yield self._row(item, memory_cfg, 0, {"error": f"{error}{self._args.rows}"})
            return
        else:
            if key not in self._best_rows:  # an interrupted child may have left half a cache
                shutil.rmtree(self._cache(item), ignore_errors=True)
            elif item.what == "warm start" and not self._cache(item).exists():
                error = "not measured: the compile cache of the earlier call is missing"
                yield self._row(item, memory_cfg, 0, {"error": error})
                return
            tokens: Any = tuning.hint(
                self.chip_name, "micro_batch_tokens", DEFAULT_MICRO_BATCH_TOKENS
            )
            rows = self._args.rows or self._best_rows.get(key)
            rows = rows or first_rows(memory_cfg, job.usable_bytes, tokens)
            start_s = time.monotonic()
            result, rows = halve_until_it_fits(attempt, rows)
            self._taken_s[key] = time.monotonic() - start_s
            yield self._row(item, memory_cfg, rows, result)
        if key in self._best_rows or "error" in result:
            return
        self._best_rows[key] = rows
        if rows > 1 and not self._args.tiny and not self._args.rows:
            half = known[1] if known[1:] else None
            if half is None:
                enough = self._left_s > expected_s
                half = attempt(rows // 2) if enough else not_measured()
                yield self._row(item, memory_cfg, rows // 2, half)
            if half.get("tokens_per_s", 0) > result["tokens_per_s"]:
                self._best_rows[key] = rows // 2

    def _row(
        self, item: Item, memory_cfg: TrainConfig, rows: int, result: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns an item's row: the child's result and the figures derived from it.

        Args:
            memory_cfg: the config for the memory formula; see like_torch.
        """
        if "oom" in result:
            result = {"error": f"out of memory: {result['oom']}"}
        row: dict[str, Any] = {"suite": "gpu", "case": f"{item.size} {item.optimizer}"}
        row |= {"variant": item.variant, "what": item.what, "rows": rows, **result}
        if rows:
            cfg = dataclasses.replace(memory_cfg, accumulation=memory_cfg.data.batch // rows)
            row["formula_bytes"] = estimate_memory(cfg, 1).peak
        if "step_s" in result:
            row |= step_shares(result)
            row |= self.mfu(memory_cfg, row["tokens_per_s"], row["tokens_per_s_at_524288"])
            row["targets"] = target_verdicts(item, row)
        return row

    def mfu(self, cfg: TrainConfig, tokens_per_s: float, at_524288: float | None) -> dict[str, Any]:
        """Returns MFU with causal attention, as a run reports it, and by 6N only.

        They are None, with the reason, if the chip is not in the table. `at_524288` is tokens/s.
        """
        if self.chip is None:
            reason = f"{self._device.get('device')!r} is not in the chip table"
            return {"mfu": None, "mfu_6n": None, "mfu_at_524288": None, "no_mfu": reason}
        flops = training_flops(cfg.model, cfg.data.seq_len, causal=True)
        peak = self.chip.peak_flops["bfloat16"]
        return {
            "mfu": flops.total * tokens_per_s / peak,
            "mfu_6n": flops.matrices * tokens_per_s / peak,
            "mfu_at_524288": None if at_524288 is None else flops.total * at_524288 / peak,
        }


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the suite's rows, each as soon as it is measured.

    Args:
        args: with --resume, `finished` has the rows of the earlier call.

    Raises:
        NoGpu: there is no GPU and --tiny was not given.
    """
    check_gpu(args.tiny)
    jax.config.update("jax_platforms", "cpu")  # of this process only; its children take the GPU
    sizes, optimizers = args.sizes or SIZES, args.optimizers or OPTIMIZERS
    with contextlib.ExitStack() as stack:
        if args.resume:
            folder = f"{args.json}.cache"  # so that the next call finds the compile caches
            os.makedirs(folder, exist_ok=True)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        suite, rows = GpuSuite(args, Path(folder), args.finished), list(args.finished)
        device_row, compared = suite.measure_device(), set()
        if device_row not in rows:
            yield stamp(device_row, args.tiny)
        if "error" in device_row:
            return
        choices = tuning.choices_for(suite.chip_name)
        for item in build_items(sizes, optimizers, args.variants or VARIANTS, choices):
            for row in suite.measure(item):
                rows.append(row)
                yield stamp(row, args.tiny)
            ratio = ratio_row(rows, item.size, item.optimizer)
            if ratio and ratio["case"] not in compared:
                compared.add(ratio["case"])
                yield stamp(ratio, args.tiny)
