"""The child process that runs PyTorch: times its compiled step, or trains it on text."""

import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jaxtrain.benchmarks.child import BenchJob, child_main, job_config
from jaxtrain.benchmarks.step_timing import WARM_UP_STEPS, median_and_range, time_steps
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.crosscheck.torch_data import shard_batches
from jaxtrain.crosscheck.torch_model import build_torch_model
from jaxtrain.crosscheck.torch_train import build_update, rate_fraction

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
INIT_STD = 0.02  # of random weights, where only the time matters
OOM_TEXTS = "out of memory", "CUBLAS_STATUS_ALLOC_FAILED"  # cuBLAS raises a plain RuntimeError


def is_oom(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OOM_TEXTS)


def check_gpu(job: BenchJob) -> None:
    """Raises RuntimeError if torch sees no GPU and the job is not tiny."""
    if not job.tiny and not HAS_GPU:
        raise RuntimeError(
            f"torch {torch.__version__} sees no GPU, so its figures would be a processor's. "
            "Install torch for CUDA, or set --variants=jaxtrain."
        )


def mark_time() -> Any:
    """Returns an event at this point of the GPU's queue or, on a CPU, the time in seconds."""
    if not HAS_GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    return start.elapsed_time(end) / 1e3 if HAS_GPU else end - start


class TorchStep:
    """PyTorch's training step: compiled micro-batches, clipping, fused optimizers.

    On a CPU, which only --tiny uses, it is not compiled: torch.compile's C++ takes minutes there.
    """

    def __init__(self, cfg: TrainConfig, params: dict[str, Any] | None = None):
        torch.set_float32_matmul_precision("high")
        self._model = build_torch_model(cfg.model, params)
        if params is None:
            for p in self._model.parameters():
                if p.ndim > 1:
                    torch.nn.init.normal_(p, std=INIT_STD)
        self._model.to(DEVICE)
        self._loss = torch.compile(self._model.loss) if HAS_GPU else self._model.loss
        self._update, self._accumulation = build_update(cfg, self._model), cfg.accumulation
        self.update_marks: list[tuple[Any, Any]] = []  # start and end of each step's update

    def run(self, tokens_BT1: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
        """Runs a step and returns its mean loss in nats, on the device."""
        nats = torch.zeros((), device=DEVICE)
        for part in tokens_BT1.chunk(self._accumulation):
            loss = self._loss(part) / self._accumulation
            loss.backward()
            nats += loss.detach()
        start = mark_time()
        self._update(rate)
        self.update_marks.append((start, mark_time()))
        self._model.zero_grad()
        return nats

    def launch(self, tokens_BT1: np.ndarray) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Starts a step; returns its loss and an event after it, which `wait` waits for."""
        tokens = torch.from_numpy(tokens_BT1.astype(np.int64))
        if not HAS_GPU:
            return self.run(tokens), None
        nats = self.run(tokens.pin_memory().to(DEVICE, non_blocking=True))
        event = torch.cuda.Event()
        event.record()
        return nats, event


def wait(launched: tuple[torch.Tensor, torch.cuda.Event | None]) -> None:
    """Waits for a step by its event, because reading its loss would wait for later steps too."""
    nats, event = launched
    if event is None:
        float(nats)
    else:
        event.synchronize()


def train(job: BenchJob) -> dict[str, Any]:
    """Returns the times and the memory of PyTorch's step; see time_steps."""
    check_gpu(job)
    cfg = job_config(job)
    step = TorchStep(cfg)
    result = time_steps(job, cfg, step.launch, wait)
    result["compile_s"] = None  # torch compiles in the first step: see first_step_s
    result["peak_bytes"] = torch.cuda.max_memory_allocated() if HAS_GPU else None
    counted = step.update_marks[1 + WARM_UP_STEPS :]
    result |= median_and_range("optimizer", [seconds_between(*marks) for marks in counted])
    cuda = torch.version.cuda  # pyright: ignore[reportAttributeAccessIssue]
    return result | {"versions": {"torch": torch.__version__, "cuda": cuda}}


def train_losses(job: BenchJob) -> dict[str, Any]:
    """Trains each seed from the JAX child's first weights, on its shards; returns the losses."""
    check_gpu(job)
    cfg, losses = job_config(job), {}
    for seed in job.seeds:
        step = TorchStep(cfg, dict(np.load(Path(job.folder) / f"weights_{seed}.npz")))
        batches = shard_batches(job.shards, cfg.data.batch, cfg.data.seq_len, seed)
        nats = []
        for count, batch in enumerate(islice(batches, job.steps)):
            tokens = batch["tokens"].to(DEVICE)
            nats.append(step.run(tokens, rate_fraction(cfg.optim, count)))
        losses[str(seed)] = [float(x) for x in nats]
    return {"losses": losses}


KINDS = {"train": train, "losses": train_losses}

if __name__ == "__main__":
    child_main(KINDS, is_oom)
