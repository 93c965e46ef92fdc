"""Builds the config of `crosscheck record` from a Hugging Face folder and a recorded trace."""

import dataclasses

from ml_collections import ConfigDict

from jaxtrain.config import train_config as config_lib
from jaxtrain.config.data_section import DataConfig
from jaxtrain.config.sections import OptimConfig
from jaxtrain.crosscheck.trace import batches_of, read_trace
from jaxtrain.interop.hf import read_config


def build_record_config(weights: str, batches: str) -> ConfigDict:
    """Returns a config with the model of a folder and the batches and precision of a trace.

    The optimizer is AdamW at a constant rate, without decay or clipping; flags change it.

    Raises:
        ValueError: the folder or the trace is not given, or they are of different models.
        InteropError: the folder describes a model that our transformer does not compute.
        TraceError: the trace has no batches.
    """
    if not weights or not batches:
        raise ValueError("record needs a config, or both --weights=HF_FOLDER and --batches=TRACE.")
    trace = read_trace(batches)
    tokens_BT1 = next(batches_of(trace))["tokens"]
    model = read_config(weights)
    largest = max(int(batch["tokens"].max()) for batch in batches_of(trace))
    if largest >= model.V:
        raise ValueError(
            f"the batches must fit the model of {weights}, whose vocabulary has {model.V} tokens; "
            f"got token {largest} in {batches}. Is it the folder of the recorded model?"
        )
    precision = trace.header["precision"]
    optim = OptimConfig(
        name="adamw", schedule="constant", warmup_steps=0, clip_norm=0.0, ns_dtype=precision
    )
    cfg = config_lib.TrainConfig(
        workdir="runs/crosscheck_record",
        weights=weights,
        model=dataclasses.replace(model, dtype=precision),
        data=DataConfig(batch=tokens_BT1.shape[0], seq_len=tokens_BT1.shape[1] - 1),
        optim=optim,
    )
    return config_lib.to_config_dict(cfg)
