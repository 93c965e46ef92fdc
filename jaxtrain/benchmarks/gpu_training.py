"""Suite gpu: our training step at 124M to 1.4B against compiled PyTorch, in one run on one card.

Each row is a process of its own: the frameworks never hold memory at once, and a crash is a row
that says so. This process stays off the GPU; it plans the minutes, most valuable first, and what
they do not reach is a row too. Tokens a step are the config's, or fewer where a step would take
longer than STEP_S; both frameworks have the same, each in the micro-batch that it is fastest at.
"""

import dataclasses
import glob
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import jax

from jaxtrain.benchmarks.child import BenchJob, config_of, run_child
from jaxtrain.benchmarks.gpu_results import IN_TORCH, Item, ratio_row, shares, targets
from jaxtrain.distributed import memory
from jaxtrain.metrics.flops import training_flops
from jaxtrain.ops import tuning
from jaxtrain.planning.memory_formula import estimate_memory
from pallas_kernels.chip import CHIPS

SIZES = ("gpt_124m", "gpt_350m", "gpt_774m", "llama_1400m")
OPTIMIZERS = ("muon", "adamw", "accelerated_lmo")
VARIANTS = ("jaxtrain", "pytorch")
CHILD = {"jaxtrain": "jax_child", "pytorch": "torch_child"}
ENV = memory.environment()  # for the children that start no run
TORCH_CACHES = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"

# To plan the minutes, not to report: what a child takes before its steps, and its likely speed.
START_S, COMPILE_S, TORCH_LAYER_S, LIKELY_MFU = 20.0, 40.0, 2.0, 0.35
STEP_S, COUNTED_S, LEAST_TOKENS = 1.5, 15.0, 16_384


class NoGpu(ValueError):
    """A suite of GPUs was asked for where there is none."""


def build_items(sizes, optimizers, variants, choices=()) -> list[Item]:
    """All rows, the most valuable first: Muon at each size beside its twin, then the others."""
    found = []
    for optimizer in optimizers:
        for size in sizes:
            wanted = [v for v in variants if v == "jaxtrain" or optimizer in IN_TORCH]
            found += [Item(size, variant, optimizer) for variant in wanted]
    if "jaxtrain" in variants:
        found.append(Item(sizes[-1], "jaxtrain", optimizers[0], "warm start"))
        tried = [c for c in choices if c.is_option and not c.applied]
        found += [Item(sizes[0], "jaxtrain", optimizers[0], c.name) for c in tried]
    return found


def need_gpu(tiny: bool) -> None:
    """Raises NoGpu where there is none and no trial was asked for."""
    if not tiny and not glob.glob("/dev/nvidia[0-9]*") and not os.path.exists("/dev/dxg"):
        raise NoGpu(
            "suites gpu and judge need a GPU, as their figures mean nothing elsewhere; got none. "
            "Set --tiny to try their path on this processor."
        )


def batch_of(cfg, flops_per_s) -> int:
    """Sequences a step: the config's, halved while a step would likely take over STEP_S.

    Args:
        flops_per_s: the device's peak, or what its matrix product was measured to reach.
    """
    batch, data = cfg.data.batch, cfg.data
    flops = training_flops(cfg.model, data.seq_len, causal=True).total
    token_s = flops / (LIKELY_MFU * flops_per_s)
    while batch * data.seq_len * token_s > STEP_S and batch * data.seq_len > LEAST_TOKENS:
        batch //= 2
    return batch


def as_torch(cfg):
    """The config whose memory by formula is nearest to the twin's: it keeps all, logits too."""
    model = dataclasses.replace(cfg.model, remat="none")
    loss = dataclasses.replace(cfg.loss, chunk_bytes=2**40)
    return dataclasses.replace(cfg, model=model, loss=loss)


def first_rows(cfg, usable_bytes, tokens) -> int:
    """The largest micro-batch, a power of two, of at most `tokens` that fits by plan's formula."""
    rows = 1
    while 2 * rows <= min(cfg.data.batch, max(tokens // cfg.data.seq_len, 1)):
        tried = dataclasses.replace(cfg, accumulation=cfg.data.batch // (2 * rows))
        if usable_bytes and estimate_memory(tried, 1).peak > usable_bytes:
            break
        rows *= 2
    return rows


def halve_until_it_fits(attempt, rows: int) -> tuple[dict, int]:
    """(result, rows) of attempt(rows), with half of the rows after each out-of-memory."""
    tried = []
    while True:
        found = attempt(rows)
        if "oom" not in found:
            return found | {"out_of_memory_at": tried}, rows
        tried.append(rows)
        if rows == 1:
            return {"error": f"out of memory with one row: {found['oom']}"}, rows
        rows //= 2


class Suite:
    """The state of one run of the suite: the device, the time left, the micro-batches found."""

    def __init__(self, args, folder: Path):
        self.args, self.folder, self.best, self.taken_s = args, folder, {}, {}
        self.until = time.monotonic() + 60 * args.minutes
        self.chip, self.device = None, {}

    @property
    def left_s(self) -> float:
        return self.until - time.monotonic()

    def child(self, variant, job) -> dict:
        # Else torch's first start would find what an earlier suite has compiled, and ours nothing.
        kept = {name: f"{self.folder / job.size}/{name}" for name in TORCH_CACHES}
        return run_child(CHILD[variant], job, self.folder, max(self.left_s, 1.0), ENV | kept)

    def look(self) -> dict:
        """The row of the device and its ceilings."""
        self.device = self.child("jaxtrain", BenchJob("about", tiny=self.args.tiny))
        kinds = {chip.kind: chip for chip in CHIPS.values()}
        self.chip = kinds.get(self.device.get("device"))
        return {"suite": "gpu", "case": "ceilings", **self.device}

    def job(self, item) -> tuple:
        """(BenchJob, TrainConfig) of an item but for its micro-batch."""
        args = self.args
        tried = [c for c in tuning.choices_for(self.name) if c.name == item.what]
        trace = f"{args.trace}/{item}".replace(" ", "_") if args.trace else ""
        job = BenchJob(
            "train",
            item.size,
            item.optimizer,
            most_s=0.0 if args.tiny else COUNTED_S,
            tiny=args.tiny,
            usable_bytes=self.device.get("bytes_limit", 0),
            cache=str(self.folder / item.size),
            trace=trace if item.what == "step" else "",
            options={c.name: c.value for c in tried},
        )
        cfg = config_of(job)
        batch = batch_of(cfg, self.flops_per_s)
        data = dataclasses.replace(cfg.data, batch=batch)
        cfg = dataclasses.replace(cfg, accumulation=1, data=data)
        return dataclasses.replace(job, batch=batch), cfg

    @property
    def name(self) -> str:
        return self.chip.name if self.chip else ""

    @property
    def flops_per_s(self) -> float:
        """The datasheet's where the chip is known, so that a step has the same tokens each time."""
        if self.chip is None:
            return self.device["matmul_flops_per_s"]
        return self.chip.peak_flops["bfloat16"]

    def needs_s(self, item, cfg) -> float:
        """Likely seconds of an item; what its like took, where one is known."""
        known = self.taken_s.get((item.size, item.variant))
        if known or self.args.tiny:
            return known or 0.0
        torch_s = TORCH_LAYER_S * cfg.model.L if item.variant == "pytorch" else 0.0
        return START_S + COMPILE_S + torch_s + COUNTED_S + 4 * STEP_S

    def measure(self, item):
        """Rows of one item: at its micro-batch, and, the first of a size, at half of it."""
        job, cfg = self.job(item)
        needs_s, key = self.needs_s(item, cfg), (item.size, item.variant)
        if self.left_s < needs_s:
            reason = f"not measured: it takes about {needs_s:.0f} s, {self.left_s:.0f} are left"
            yield self.row(item, cfg, 0, {"error": reason})
            return
        tokens = tuning.hint(self.name, "micro_batch_tokens", 32_768)
        likely = cfg if item.variant == "jaxtrain" else as_torch(cfg)
        rows = self.best.get(key) or first_rows(likely, job.usable_bytes, tokens)
        attempt = lambda rows: self.child(item.variant, dataclasses.replace(job, rows=rows))
        start_s = time.monotonic()
        found, rows = halve_until_it_fits(attempt, rows)
        self.taken_s[key] = time.monotonic() - start_s
        yield self.row(item, likely, rows, found)
        if key in self.best or "error" in found:
            return
        self.best[key] = rows
        if rows > 1 and self.left_s > needs_s and not self.args.tiny:
            half = attempt(rows // 2)
            yield self.row(item, likely, rows // 2, half)
            if half.get("tokens_per_s", 0) > found["tokens_per_s"]:
                self.best[key] = rows // 2

    def row(self, item, cfg, rows, found) -> dict:
        """An item's row: what the child found, and what follows from it.

        Args:
            cfg: of whose memory the formula is asked; see as_torch.
        """
        row = {"suite": "gpu", "case": f"{item.size} {item.optimizer}", "variant": item.variant}
        if "oom" in found:
            found = {"error": f"out of memory: {found['oom']}"}
        row |= {"what": item.what, "rows": rows, **found}
        if rows:
            parts = cfg.data.batch // rows
            row["formula_bytes"] = estimate_memory(
                dataclasses.replace(cfg, accumulation=parts), 1
            ).peak
        if "step_s" in found:
            row |= shares(found)
            row |= self.mfu(cfg, row["tokens_per_s"], row["tokens_per_s_at_524288"])
            row["targets"] = targets(item, row)
        return row

    def mfu(self, cfg, tokens_per_s, there) -> dict:
        """As a run has it: 6N and attention of the keys that a query sees, and 6N alone.

        None, with the reason, on a chip that the table does not have.

        Args:
            there: tokens/s of a step of SHARE_TOKENS; None where it is not known.
        """
        if self.chip is None:
            reason = f"{self.device.get('device')!r} is not in the chip table"
            return {"mfu": None, "mfu_6n": None, "mfu_at_524288": None, "no_mfu": reason}
        flops = training_flops(cfg.model, cfg.data.seq_len, causal=True)
        of = lambda flops, rate: flops * rate / self.chip.peak_flops["bfloat16"]
        return {
            "mfu": of(flops.total, tokens_per_s),
            "mfu_6n": of(flops.matrices, tokens_per_s),
            "mfu_at_524288": None if there is None else of(flops.total, there),
        }


def stamp(row, tiny: bool) -> dict:
    """A row with when it was made; a trial's is held against no target of a card."""
    date = {"date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    return row | date | ({"tiny": True, "targets": {}} if tiny else {})


def run(args):
    """Yields the suite's rows, each as soon as it is measured.

    Raises:
        NoGpu: there is none, and --tiny was not given.
    """
    need_gpu(args.tiny)
    jax.config.update("jax_platforms", "cpu")  # of this process alone: the children have the GPU
    sizes = args.sizes or SIZES
    chosen = sizes, args.optimizers or OPTIMIZERS, args.variants or VARIANTS
    with tempfile.TemporaryDirectory() as folder:
        suite, rows = Suite(args, Path(folder)), []
        row = suite.look()
        yield stamp(row, args.tiny)
        if "error" in row:
            return
        told = set()
        for item in build_items(*chosen, tuning.choices_for(suite.name)):
            for row in suite.measure(item):
                rows.append(row)
                yield stamp(row, args.tiny)
            pair = ratio_row(rows, item.size, item.optimizer)
            if pair and pair["case"] not in told:
                told.add(pair["case"])
                yield stamp(pair, args.tiny)
