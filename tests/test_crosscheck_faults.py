"""Plants classic faults in the PyTorch side; the comparison must name the stage and the step."""

import dataclasses
import math

import jax
import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason='torch is missing: pip install "jaxtrain[crosscheck]" to test the PyTorch side'
)
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from jaxtrain.crosscheck import torch_model, torch_muon, torch_train  # noqa: E402
from jaxtrain.crosscheck.comparison import compare_traces  # noqa: E402
from jaxtrain.crosscheck.explanation import explain, steps_table  # noqa: E402
from tests.crosscheck_sides import (  # noqa: E402, F401
    one_layer,
    one_thread_and_old_x64_setting,
    record_jax,
    record_torch,
    small_config,
)

TEXT = "".join(f"line {i}: {i * i} is the square of {i}.\n" for i in range(2_000))
RUNS = {
    "gpt2": {"model": "gpt2", "name": "adamw", "weight_decay": 0.1},
    "llama": {"model": "llama", "name": "muon", "weight_decay": 0.1},
    "packed": {"model": "llama", "name": "adamw", "data": {"pack": True, "seq_len": 64}},
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Returns get(run) -> (Start, trace of the jaxtrain side), recorded at the first call."""
    folder, made = tmp_path_factory.mktemp("faults"), {}
    (folder / "text").mkdir()
    for i in range(200):  # no two fit into a packed row of 65, so each row has padding
        (folder / "text" / f"{i:03}.txt").write_text(TEXT[40 * i : 40 * i + 50])

    def get(name):
        if name not in made:
            cfg = small_config(folder=folder / name, text=folder / "text", **RUNS[name])
            cfg = one_layer(cfg) if name == "packed" else cfg
            made[name] = record_jax(cfg, folder / f"{name}.jsonl", keep_batches=True)
        return made[name]

    return get


def interleave_rope(patch):
    def rotate(x_BHTK, cos_TK, sin_TK):
        turned = torch.stack((-x_BHTK[..., 1::2], x_BHTK[..., ::2]), -1).flatten(-2)
        half = cos_TK.shape[-1] // 2
        cos, sin = (table[:, :half].repeat_interleave(2, -1) for table in (cos_TK, sin_TK))
        return x_BHTK * cos + turned * sin

    patch.setattr(torch_model, "rotate", rotate)


def exact_gelu(patch):
    gelu = F.gelu
    patch.setattr(F, "gelu", lambda x, approximate="none": gelu(x))


def shift_targets(patch):
    entropy = F.cross_entropy
    patch.setattr(F, "cross_entropy", lambda logits, y, **kw: entropy(logits, y.roll(-1), **kw))


def count_padding(patch):
    losses = torch_model.TorchTransformer.losses

    def wrong(self, tokens_BT1, docs_BT1=None, **options):
        options["weights_BT"] = None
        return losses(self, tokens_BT1, torch.zeros_like(docs_BT1), **options)

    patch.setattr(torch_model.TorchTransformer, "losses", wrong)


class Adam(torch.optim.Optimizer):
    """AdamW written out, with a fault to choose."""

    def __init__(self, groups, betas, eps, fused, correct=True, inside=False):
        super().__init__(groups, {"weight_decay": 0.0})  # each group has its lr
        self.betas, self.eps, self.correct, self.inside = betas, eps, correct, inside

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                n = state["n"] = state.get("n", 0) + 1
                b1, b2 = self.betas
                m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * p.grad
                v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * p.grad**2
                if self.correct:
                    m, v = m / (1 - b1**n), v / (1 - b2**n)
                root = (v + self.eps).sqrt() if self.inside else v.sqrt() + self.eps
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * m / root)


def adam(**fault):
    def plant(patch):
        patch.setattr(torch.optim, "AdamW", lambda *args, **kw: Adam(*args, **kw, **fault))

    return plant


def decay_gains(patch):
    adamw = torch.optim.AdamW

    def wrong(groups, **options):
        return adamw([group | {"weight_decay": 0.1} for group in groups], **options)

    patch.setattr(torch.optim, "AdamW", wrong)


def late_nesterov(patch):
    """Uses plain momentum, without Nesterov's extra gradient."""
    muon = torch_train.Muon
    patch.setattr(torch_train, "Muon", lambda *a, **kw: muon(*a, **kw | {"nesterov": False}))


def fan_of_the_wrong_side(patch):
    factor = lambda outputs, inputs: math.sqrt(max(1, inputs / outputs))
    patch.setitem(torch_muon.FACTORS, "original", factor)


# name: (run, fault, stage, first step, part of the first tensor's name)
FAULTS = {
    "rope interleaved": ("llama", interleave_rope, "forward", 1, "blocks.0"),
    "exact gelu": ("gpt2", exact_gelu, "forward", 1, "blocks.0"),
    "targets off by one": ("gpt2", shift_targets, "loss", 1, ""),
    "mean over padding": ("packed", count_padding, "loss", 1, ""),
    "no bias correction": ("gpt2", adam(correct=False), "optimizer", 1, ""),
    "epsilon inside the root": ("gpt2", adam(inside=True), "optimizer", 1, ""),
    "decay on gains": ("gpt2", decay_gains, "optimizer", 1, "gain"),
    "wrong nesterov": ("llama", late_nesterov, "optimizer", 2, "blocks"),
    "scale by the wrong fan": ("llama", fan_of_the_wrong_side, "optimizer", 1, "blocks"),
    "wrong shuffle seed": ("gpt2", None, "batch", 1, ""),
}


CAUSES = {  # part of the explanation
    "no bias correction": "times jaxtrain's: as without Adam's bias correction",
    "decay on gains": "pytorch decays blocks.0.attention_norm.gain, ",
    "wrong nesterov": "the first updates agree, the second do not",
    "scale by the wrong fan": "Muon's factor for the shape of a matrix",
    "wrong shuffle seed": "the inputs differ: check the shards",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported_with_stage_and_first_step(
    fault, recorded, monkeypatch, tmp_path
):
    run, plant, stage, step, tensor = FAULTS[fault]
    start, ours = recorded(run)
    cfg = start.run.cfg
    if plant:
        plant(monkeypatch)
    else:
        cfg = dataclasses.replace(cfg, seed=cfg.seed + 1)
    batches = ours if run == "packed" else None
    theirs = record_torch(start, tmp_path / "t.jsonl", cfg, batches)
    comparison = compare_traces(ours, theirs)
    found = comparison.divergence
    assert (found.stage, found.first.step) == (stage, step), found
    assert tensor in found.first.tensor
    assert CAUSES.get(fault, "") in explain(comparison)


@pytest.mark.parametrize("run", RUNS)
def test_without_a_fault_both_sides_agree_to_1e_10(run, recorded, tmp_path):
    start, ours = recorded(run)
    batches = ours if run == "packed" else None
    comparison = compare_traces(ours, record_torch(start, tmp_path / "t.jsonl", None, batches))
    assert comparison.divergence is None, explain(comparison)
    assert "AGREE" in explain(comparison)
    sizes = [d.size for found in comparison.differences.values() for d in found]
    assert max(sizes) < 1e-10
    assert len(sizes) > 100  # every tensor of every step was compared
    assert steps_table(comparison).count("\n") == len(comparison.steps)


def test_a_fault_in_the_backward_pass_only_is_reported_as_gradient(recorded, monkeypatch, tmp_path):
    """The tensor to look at is the first that the backward pass reaches after the fault."""
    start, ours = recorded("gpt2")
    norm = nn.functional.layer_norm

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    calls = iter(range(1_000))
    wrong = lambda x, *a: norm(Wrong.apply(x) if next(calls) % 5 == 2 else x, *a)
    monkeypatch.setattr(F, "layer_norm", wrong)
    found = compare_traces(ours, record_torch(start, tmp_path / "t.jsonl")).divergence
    assert (found.stage, found.first.step) == ("gradient", 1)
    assert found.first.tensor.startswith("blocks.0")  # block 1 comes earlier and is right


def test_a_weight_changed_by_one_part_in_a_million_is_found_in_float64(recorded, tmp_path):
    start, ours = recorded("llama")
    params = jax.tree.map(np.copy, start.weights)
    params["blocks"]["mlp"]["up"]["w"][1] *= 1 + 1e-6
    theirs = record_torch(start._replace(weights=params), tmp_path / "t.jsonl")
    found = compare_traces(ours, theirs).divergence
    assert (found.stage, found.first.step) == ("start", 0)
    assert found.first.tensor == "blocks.1.mlp.up.weight"
    assert found.first.size == pytest.approx(1e-6, rel=0.7)  # an estimate from 16 projections
