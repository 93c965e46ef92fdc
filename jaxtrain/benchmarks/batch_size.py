"""Chooses the tokens of a step and the micro-batch size for the GPU suite."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.metrics.flops import training_flops
from jaxtrain.planning.memory_formula import estimate_memory

STEP_S, LEAST_TOKENS = 1.5, 16_384  # steps are shortened to STEP_S, but not below LEAST_TOKENS
LIKELY_MFU = 0.35


def fitting_batch(cfg: TrainConfig, flops_per_s: float) -> int:
    """Returns the config's batch, halved until a step likely takes at most STEP_S.

    Args:
        flops_per_s: the device's peak or, if unknown, what its matrix product reached.
    """
    batch, data = cfg.data.batch, cfg.data
    flops = training_flops(cfg.model, data.seq_len, causal=True).total
    token_s = flops / (LIKELY_MFU * flops_per_s)
    while batch * data.seq_len * token_s > STEP_S and batch * data.seq_len > LEAST_TOKENS:
        batch //= 2
    return batch


def like_torch(cfg: TrainConfig) -> TrainConfig:
    """Returns a config that takes about PyTorch's memory by formula: no remat, unchunked logits."""
    model = dataclasses.replace(cfg.model, remat="none")
    loss = dataclasses.replace(cfg.loss, chunk_bytes=2**40)
    return dataclasses.replace(cfg, model=model, loss=loss)


def first_rows(cfg: TrainConfig, usable_bytes: int, tokens: int) -> int:
    """Returns the rows of a micro-batch: the largest power of two that fits by formula.

    Args:
        usable_bytes: 0 sets no limit.
        tokens: the most tokens of a micro-batch.
    """
    rows = 1
    while 2 * rows <= min(cfg.data.batch, max(tokens // cfg.data.seq_len, 1)):
        larger = dataclasses.replace(cfg, accumulation=cfg.data.batch // (2 * rows))
        if usable_bytes and estimate_memory(larger, 1).peak > usable_bytes:
            break
        rows *= 2
    return rows


def halve_until_it_fits(
    attempt: Callable[[int], dict[str, Any]], rows: int
) -> tuple[dict[str, Any], int]:
    """Returns (result, rows) of attempt(rows), halving the rows after each out-of-memory."""
    failed = []
    while "oom" in (result := attempt(rows)):
        if rows == 1:
            return {"error": f"out of memory with one row: {result['oom']}"}, rows
        failed.append(rows)
        rows //= 2
    return result | {"out_of_memory_at": failed}, rows
