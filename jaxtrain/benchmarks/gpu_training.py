"""Suite gpu: our training step at 124M to 1.4B against compiled PyTorch, on one GPU.

A child process measures each row, so that the frameworks never hold memory at the same time, and a
crash becomes a row with its reason. This process does not use the GPU. It measures the most
valuable rows first, every size once before any at half its micro-batch size, and lists those for
which no time is left. Both frameworks train the same tokens per step (the config's, or fewer if a
step would take longer than STEP_S), each in its fastest micro-batch size. With --resume it keeps
the rows of an earlier call and their compile caches.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain.benchmarks.batch_size import (
    first_rows,
    fitting_batch,
    halve_until_it_fits,
    like_torch,
    with_rows,
)
from jaxtrain.benchmarks.child import BenchJob, job_config, run_child
from jaxtrain.benchmarks.gpu_items import (
    OPTIMIZERS,
    SIZES,
    VARIANTS,
    Item,
    build_items,
    guess_seconds,
)
from jaxtrain.benchmarks.gpu_results import ratio_row, stamp, step_shares, target_verdicts
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.distributed import memory
from jaxtrain.metrics.flops import training_flops
from jaxtrain.ops import tuning
from jaxtrain.training.memory_formula import estimate_memory
from pallas_kernels.chip import Chip, chip_of_kind
from pallas_kernels.quiet import has_gpu

CHILD_MODULES = {"jaxtrain": "jax_child", "pytorch": "torch_child"}
CHILD_ENV = memory.environment()  # which training sets for itself
TORCH_CACHES = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"

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


class GpuSuite:
    """One run of the suite: the device, the deadline, and the fastest rows so far."""

    def __init__(
        self, args: argparse.Namespace, folder: Path, finished: Sequence[dict[str, Any]] = ()
    ):
        self._args, self._folder, self._finished = args, folder, finished
        self._fastest: dict[tuple[str, str], dict[str, Any]] = {}  # by size and variant
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

    @property
    def _usable_bytes(self) -> int:
        """The limit from which a child's model.remat=auto chooses; 0 if there is none."""
        if self.chip:
            return memory.usable_bytes(self.chip.hbm_bytes)
        return self._device.get("bytes_limit", 0)

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
        trace = f"{args.trace}/{str(item).replace(' ', '_')}" if args.trace else ""
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

    def _known_row(self, item: Item) -> dict[str, Any] | None:
        """Returns an item's row of an earlier call, or None."""
        name = f"{item.size} {item.optimizer}", item.variant, item.what, item.half
        for row in self._finished:
            found = row.get("case"), row.get("variant"), row.get("what"), row.get("half", False)
            if found == name:
                return row
        return None

    def measure(self, item: Item) -> dict[str, Any] | None:
        """Returns an item's row, or None if an earlier call has it or there is nothing to halve."""
        key = item.size, item.variant
        if item.half and self._fastest.get(key, {"rows": 1})["rows"] == 1:
            return None
        known = self._known_row(item)
        row = known or self._measure_new(item)
        best = self._fastest.get(key, {"tokens_per_s": 0.0})["tokens_per_s"]
        if item.what == "step" and row.get("tokens_per_s", 0.0) > best:
            self._fastest[key] = row
        return None if known else row

    def _measure_new(self, item: Item) -> dict[str, Any]:
        """Returns an item's row: measured, or why it is not."""
        args, key = self._args, (item.size, item.variant)
        job, cfg = self._build_job(item)
        memory_cfg = cfg if item.variant == "jaxtrain" else like_torch(cfg)
        guess_s = guess_seconds(item.variant, cfg.model, self.chip_name, args.seconds)
        expected_s = self._taken_s.get(key, 0.0 if args.tiny else guess_s)
        rows = self._fastest[key]["rows"] if key in self._fastest else 0
        if self._left_s < expected_s:
            reason = f"it would take about {expected_s:.0f} s; {self._left_s:.0f} s are left"
            row = self._row(item, cfg, 0, {"error": f"not measured: {reason}"})
            return row | {"unfinished": True}
        error = ""
        if args.rows > job.batch:
            error = f"--rows must be at most {job.batch}, the sequences of a step; got {args.rows}"
        elif item.what == "warm start" and not (rows and self._cache(item).exists()):
            error = "not measured: the step that fills the compile cache failed"
            if rows:
                error = "not measured: the compile cache of the earlier call is missing"
        if error:
            return self._row(item, memory_cfg, 0, {"error": error})
        if not rows:  # an interrupted child may have left half a cache
            shutil.rmtree(self._cache(item), ignore_errors=True)
            name = "micro_batch_tokens"
            tokens: Any = tuning.hint(self.chip_name, name, DEFAULT_MICRO_BATCH_TOKENS)
            rows = args.rows or first_rows(memory_cfg, self._usable_bytes, tokens, self.chip)
        start_s = time.monotonic()
        attempt = lambda rows: self._run_child(item.variant, dataclasses.replace(job, rows=rows))
        result, rows = halve_until_it_fits(attempt, rows // 2 if item.half else rows)
        self._taken_s[key] = time.monotonic() - start_s
        return self._row(item, memory_cfg, rows, result)

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
        row |= {"half": True} if item.half else {}
        if rows:
            cfg = with_rows(memory_cfg, rows, self._usable_bytes, self.chip)
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
        device_row, ratios = suite.measure_device(), {}
        if device_row not in rows:
            yield stamp(device_row, args.tiny)
        if "error" in device_row:
            return
        choices = tuning.choices_for(suite.chip_name)
        variants, halves = args.variants or VARIANTS, not (args.tiny or args.rows)
        for item in build_items(sizes, optimizers, variants, choices, halves):
            row = suite.measure(item)
            if row is not None:
                rows.append(row)
                yield stamp(row, args.tiny)
            ratio = ratio_row(rows, item.size, item.optimizer)
            if ratio and ratio != ratios.get(ratio["case"]):
                ratios[ratio["case"]] = ratio  # replaces the last one: see newest_ratios
                yield stamp(ratio, args.tiny)
