"""A child that holds PyTorch: the compiled twin's training step, its losses. See job.py."""

import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from jaxtrain.benchmarks.job import child_main, config_of, measure_steps
from jaxtrain.crosscheck.twin import build_twin
from jaxtrain.crosscheck.twin_data import shard_batches
from jaxtrain.crosscheck.twin_train import build_update, scale_at

UPDATES = 10
STD = 0.02  # of the first weights, where only the time counts


def is_oom(error) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Theirs:
    """The twin's step: micro-batches of compiled forward and backward, clipping, fused optimizers.

    On a CPU (a trial) it stays eager: there torch.compile's C++ takes minutes.
    """

    def __init__(self, cfg, params=None):
        torch.set_float32_matmul_precision("high")
        self.model = build_twin(cfg.model, params)
        if params is None:
            for p in self.model.parameters():
                if p.ndim > 1:
                    torch.nn.init.normal_(p, std=STD)
        self.model.to(device())
        on_gpu = device().type == "cuda"
        self.loss = torch.compile(self.model.loss) if on_gpu else self.model.loss
        self.update, self.parts = build_update(cfg, self.model), cfg.accumulation

    def gradient(self, tokens_BT1):
        """Mean nats, the gradients left in the parameters."""
        nats = torch.zeros((), device=device())
        for part in tokens_BT1.chunk(self.parts):
            loss = self.loss(part) / self.parts
            loss.backward()
            nats += loss.detach()
        return nats

    def step(self, tokens_BT1, rate=1.0):
        nats = self.gradient(tokens_BT1)
        self.update(rate)
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

    def update_s(self, tokens_BT1) -> float:
        """Seconds of clipping and the optimizers alone, median of updates with one gradient."""
        self.gradient(tokens_BT1)
        taken_s = []
        for _ in range(UPDATES):
            synchronise()
            start_s = time.perf_counter()
            self.update()
            synchronise()
            taken_s.append(time.perf_counter() - start_s)
        return float(np.median(taken_s))


def synchronise() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def wait(launched) -> None:
    nats, event = launched
    float(nats) if event is None else event.synchronize()


def train(job) -> dict:
    """Times and memory of the twin's step; see job.measure_steps."""
    cfg = config_of(job)
    start_s = time.perf_counter()
    theirs = Theirs(cfg)
    found = measure_steps(job, cfg, theirs.launch, wait)
    found["compile_s"] = None  # torch compiles within the first step, which first_step_s holds
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if device().type == "cuda" else None
    tokens = torch.zeros((job.rows, cfg.data.seq_len + 1), dtype=torch.long, device=device())
    theirs.parts = 1
    found["optimizer_s"] = theirs.update_s(tokens)
    found["child_s"] = time.perf_counter() - start_s
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
    found = {}
    for seed in job.seeds:
        cfg = config_of(job)
        theirs = Theirs(cfg, nested(np.load(Path(job.folder) / f"weights_{seed}.npz")))
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
