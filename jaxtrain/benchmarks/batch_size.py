"""Chooses the tokens of a step and the micro-batch size for the GPU suite."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.metrics.flops import training_flops
from jaxtrain.training.memory_formula import estimate_memory
from jaxtrain.training.remat import AUTO, choose_remat, with_remat
from pallas_kernels.chip import Chip

STEP_S, LEAST_TOKENS = 1.5, 16_384  # steps are shortened to STEP_S, but not below LEAST_TOKENS
LIKELY_MFU = 0.35
WORTHWHILE_TOKENS = 8_192  # smaller micro-batches cost more than recomputation does


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
    loss = dataclasses.replace(cfg.loss, chunk_bytes=2**40)
    return dataclasses.replace(with_remat(cfg, "none"), loss=loss)


def with_rows(
    cfg: TrainConfig, rows: int, usable_bytes: int, chip: Chip | None = None
) -> TrainConfig:
    """Returns cfg with `rows` rows in a micro-batch, and the remat that a run then chooses.

    Args:
        usable_bytes: of the device; 0 sets no limit.
        chip: None if it is not in the chip table.
    """
    cfg = dataclasses.replace(cfg, accumulation=cfg.data.batch // rows)
    if cfg.model.remat != AUTO:
        return cfg
    if not usable_bytes:
        return with_remat(cfg, "none")
    about = (chip.arch, chip.name) if chip else ("", "")
    return choose_remat(cfg, 1, usable_bytes, *about)[0]


def first_rows(cfg: TrainConfig, usable_bytes: int, tokens: int, chip: Chip | None = None) -> int:
    """Returns the rows of a micro-batch: the largest power of two that fits by formula.

    With model.remat=auto, the largest that recomputes nothing is preferred, if it has at least
    WORTHWHILE_TOKENS.

    Args:
        usable_bytes: 0 sets no limit.
        tokens: the most tokens of a micro-batch.
        chip: as in with_rows.
    """
    most = min(cfg.data.batch, max(tokens // cfg.data.seq_len, 1))
    choices = [2**i for i in range(most.bit_length())]
    if cfg.model.remat == AUTO:
        for rows in reversed(choices):
            enough = rows * cfg.data.seq_len >= WORTHWHILE_TOKENS
            if enough and with_rows(cfg, rows, usable_bytes, chip).model.remat == "none":
                return rows
    for rows, larger in itertools.pairwise(choices):
        setting = with_rows(cfg, larger, usable_bytes, chip)
        if usable_bytes and estimate_memory(setting, 1).peak > usable_bytes:
            return rows
    return choices[-1]


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
