import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from data_samples import llmc

import runs
from jaxtrain.data.sources import open_split
from jaxtrain.planning.hardware import build_hardware
from jaxtrain.planning.mixture import plan_mixture
from pallas_kernels.chip import find_chip

PLATFORMS = os.environ["JAX_PLATFORMS"]
from jaxtrain import plan  # noqa: E402

os.environ["JAX_PLATFORMS"] = PLATFORMS  # the command sets it

STAGES = "a 0.75, b 0.25 until 50%; a 0.25, b 0.75"  # 20 steps of 8 sequences of 32 tokens


@pytest.fixture
def cfg(tmp_path):
    for name, shards in {"a": (3_000, 2_000), "b": (1_000,)}.items():
        (tmp_path / name).mkdir()
        for i, count in enumerate(shards):
            tokens = llmc(np.arange(count) % 256)
            (tmp_path / name / f"x_train_{i + 1:06}.bin").write_bytes(tokens)
        (tmp_path / name / "x_val_000000.bin").write_bytes(llmc(np.arange(900) % 256))
    mixture = f"a='{tmp_path}/a' b='{tmp_path}/b'"
    return runs.debug_config(
        tmp_path / "run", "", steps=20, data__mixture=mixture, data__stages=STAGES
    )


def test_a_plan_counts_the_tokens_and_epochs_that_the_run_reads(cfg):
    rows = plan_mixture(cfg)
    corpus = open_split(cfg.data, "train", cfg.model.V, cfg.workdir, cfg.steps)
    read = corpus.mixture.counts(corpus.places) * cfg.data.seq_len
    assert [row["tokens"] for row in rows.values()] == read.tolist() == [80 * 32, 80 * 32]
    assert [row["stored_tokens"] for row in rows.values()] == [5_000, 1_000]
    assert [row["epochs"] for row in rows.values()] == [0.512, 2.56]


def test_the_plan_of_text_that_is_not_encoded_has_no_epochs(tmp_path, cfg, capsys):
    text = runs.write_text(tmp_path)
    mixture = f"a='{tmp_path}/a' b='{text}'"
    cfg = runs.debug_config(tmp_path / "run", "", data__mixture=mixture, data__stages=STAGES)
    hardware = build_hardware(find_chip("a40"), 1, 1, "", "ethernet10")
    assert plan.print_estimate(cfg, hardware, SimpleNamespace(json=False)) == 0
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "2,560", "50.00%", "0.512", "5,000"] in words
    assert ["b", "2,560", "50.00%", "-", "-"] in words
    assert plan.print_estimate(cfg, hardware, SimpleNamespace(json=True)) == 0
    assert json.loads(capsys.readouterr().out)["mixture"]["b"]["epochs"] is None


def test_a_plan_without_a_mixture_has_none(tmp_path):
    assert plan_mixture(runs.debug_config(tmp_path, "text")) == {}
