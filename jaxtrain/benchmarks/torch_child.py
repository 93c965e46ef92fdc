"""A child that holds PyTorch: the compiled twin's training step, its losses. See job.py."""

import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from jaxtrain.benchmarks.child import WARM_UP, child_main, config_of, measure_steps, spread
from jaxtrain.crosscheck.torch_data import shard_batches
from jaxtrain.crosscheck.torch_model import build_torch_model
from jaxtrain.crosscheck.torch_train import build_update, scale_at

STD = 0.02  # of the first weights, where only the time counts
OOM_WORDS = "out of memory", "CUBLAS_STATUS_ALLOC_FAILED"  # cuBLAS raises no error of torch's


def is_oom(error) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in OOM_WORDS)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def need_cuda(job) -> None:
    """Raises RuntimeError where torch has no GPU and the job is no trial."""
    if not job.tiny and device().type == "cpu":
        raise RuntimeError(
            f"torch {torch.__version__} sees no GPU, so its figures would be a processor's. "
            "Install torch for CUDA, or set --variants=jaxtrain."
        )


def now():
    """A moment in the device's own time: an event on a GPU, else seconds."""
    if device().type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between_s(start, end) -> float:
    return end - start if device().type == "cpu" else start.elapsed_time(end) / 1e3


class TorchStep:
    """The twin's step: micro-batches of compiled forward and backward, clipping, fused optimizers.

    On a CPU (a trial) it stays eager: there torch.compile's C++ takes minutes.
    """

    def __init__(self, cfg, params=None):
        torch.set_float32_matmul_precision("high")
        self.model = build_torch_model(cfg.model, params)
        if params is None:
            for p in self.model.parameters():
                if p.ndim > 1:
                    torch.nn.init.normal_(p, std=STD)
        self.model.to(device())
        on_gpu = device().type == "cuda"
        self.loss = torch.compile(self.model.loss) if on_gpu else self.model.loss
        self.update, self.parts = build_update(cfg, self.model), cfg.accumulation
        self.updates = []  # (start, end) of clipping and the optimizers in each step

    def gradient(self, tokens_BT1):
        """Mean nats, the gradients left in the parameters."""
        nats = torch.zeros((), device=device())
        for part in tokens_BT1.chunk(self.parts):
            loss = self.loss(part) / self.parts
            loss.backward()
            nats += loss.detach()
        return nats

    def step(self, tokens_BT1, rate=1.0):
        nats, start = self.gradient(tokens_BT1), now()
        self.update(rate)
        self.updates.append((start, now()))
        self.model.zero_grad()
        return nats

    def launch(self, tokens_BT1):
        """(nats, an event after the step): waiting for the event waits for no later step."""
        tokens = torch.from_numpy(tokens_BT1.astype(np.int64))
        if device().type == "cpu":
            return self.step(tokens), None
        nats = self.step(tokens.pin_memory().to(device(), non_blocking=True))
        event = torch.cuda.Event()
        event.record()
        return nats, event


def wait(launched) -> None:
    nats, event = launched
    float(nats) if event is None else event.synchronize()


def train(job) -> dict:
    """Times and memory of the twin's step; see job.measure_steps."""
    need_cuda(job)
    cfg = config_of(job)
    theirs = TorchStep(cfg)
    found = measure_steps(job, cfg, theirs.launch, wait)
    found["compile_s"] = None  # torch compiles within the first step, which first_step_s holds
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if device().type == "cuda" else None
    counted = theirs.updates[1 + WARM_UP :]
    found |= spread("optimizer", [between_s(*update) for update in counted])
    return found | {"versions": {"torch": torch.__version__, "cuda": torch.version.cuda}}


def nested(named) -> dict:
    """{"a/b": x} as a plain nested dict."""
    tree = {}
    for name, x in named.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = x
    return tree


def losses(job) -> dict:
    """Each seed's training losses from our first weights, on the shards that ours read."""
    need_cuda(job)
    found = {}
    for seed in job.seeds:
        cfg = config_of(job)
        theirs = TorchStep(cfg, nested(np.load(Path(job.folder) / f"weights_{seed}.npz")))
        batches = shard_batches(job.shards, cfg.data.batch, cfg.data.seq_len, seed)
        nats = []
        for count, batch in enumerate(islice(batches, job.steps)):
            tokens = batch["tokens"].to(device())
            nats.append(theirs.step(tokens, scale_at(cfg.optim, count)))
        found[str(seed)] = [float(x) for x in nats]
    return {"losses": found}


KINDS = {"train": train, "losses": losses}

if __name__ == "__main__":
    child_main(KINDS, is_oom)
