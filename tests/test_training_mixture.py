"""A whole run on a mixture, in this process."""

import json

import jax
import numpy as np
import pytest

import runs
from jaxtrain.branching.branch import create_branch, plan_branch
from jaxtrain.config.train_config import freeze, to_dict
from jaxtrain.metrics.jsonl import read_metrics
from jaxtrain.train import train
from jaxtrain.training.source_losses import SourceLosses
from jaxtrain.training.step import BY_SOURCE

SMALL = {"model__L": 1, "model__D": 16, "model__F": 32, "optim__name": "adamw"}
SMALL |= {"model__attention": "reference"}  # compiles fastest
SMALL |= {"sample__tokens": 0, "eval_every": 6, "data__val_fraction": 0.2}


def config(folder, steps):
    stages = "plus 0.75, words 0.25 until 3072; plus 0.1, words 0.9"  # from step 12 on
    mixture = f"plus='{folder}/plus.txt' words='{folder}/words'"
    values = SMALL | {"data__mixture": mixture, "data__stages": stages, "steps": steps}
    return runs.debug_config(folder / "run", "", **values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a mixture")
    sums = [f"{a} plus {b} is {a + b}\n" for a in range(60) for b in range(60)]
    (folder / "plus.txt").write_text("".join(sums))
    (folder / "words").mkdir()
    for i in range(20):
        (folder / "words" / f"{i}.txt").write_text("nothing but words " * 50)
    return folder


def test_a_run_reports_exact_counts_and_losses_of_each_source(folder, capsys):
    assert train(config(folder, 16), jax.devices()[:1]) == 0
    out = capsys.readouterr().out
    assert "stage 2   steps 13 to 16: plus 0.1, words 0.9; exact in any 10 sequences" in out
    tokens = {"plus": 72 + 3, "words": 24 + 29}  # sequences of 12 + 4 steps of 8
    summary = json.loads((folder / "run" / "summary.json").read_text())
    for name, figures in summary["sources"].items():
        assert figures["tokens"] == tokens[name] * 32
        assert figures["epochs"] == figures["tokens"] / figures["stored_tokens"]
        assert figures["unread_tokens"] == max(0, figures["stored_tokens"] - figures["tokens"])
    records = read_metrics(folder / "run" / "metrics.jsonl")
    counted = {r["step"]: r["data/plus_tokens"] for r in records if "data/plus_tokens" in r}
    assert [counted[step] for step in (1, 6, 12)] == [6 * 32, 36 * 32, 72 * 32]
    first = next(r for r in records if r["step"] == 1)  # it has 6 sequences of plus, 2 of words
    own = [first[f"train/{name}_loss_nats"] for name in ("plus", "words")]
    assert own[0] != own[1]
    assert first["train/loss_nats"] == pytest.approx((6 * own[0] + 2 * own[1]) / 8)
    losses = [r for r in records if "eval/plus_loss_nats" in r]
    assert [r["step"] for r in losses] == [6, 12, 16]
    share = summary["sources"]["plus"]["tokens"] / (16 * 8 * 32)
    own = [summary[f"eval/{name}_loss_nats"] for name in ("plus", "words")]
    assert own[0] != own[1]
    assert summary["eval/loss_nats"] == pytest.approx(share * own[0] + (1 - share) * own[1])
    bits = [summary[f"eval/{name}_bits_per_byte"] for name in ("plus", "words")]
    assert min(bits) < summary["eval/bits_per_byte"] < max(bits)
    config_json = json.loads((folder / "run" / "config.json").read_text())
    assert list(config_json["data"]["sources"]) == ["plus", "words"]


def test_losses_by_source_are_means_over_the_steps_since_the_last_call():
    losses = SourceLosses(("a", "b", "unread"))
    for parts, shares in (([1, 6], [0.25, 0.75]), ([np.nan, 1], [0.5, 0.5]), ([2, 1], [0.5, 0.5])):
        scalars = {BY_SOURCE: np.array([[*parts, 0], [*shares, 0]]), "train/loss_nats": 0.0}
        losses.take_from(scalars)
        assert list(scalars) == ["train/loss_nats"]
    assert losses.means() == {"train/a_loss_nats": 3 / 0.75, "train/b_loss_nats": 7 / 1.25}
    assert losses.means() == {}


def test_a_branch_on_another_mixture_counts_what_the_branch_has_read(folder):
    values = {"data__mixture": f"plus='{folder}/plus.txt' words='{folder}/words'", "steps": 4}
    values |= {"data__stages": "plus 0.5, words 0.5", "eval_every": 0, "save_every": 4}
    cfg = runs.debug_config(folder / "trunk", "", **SMALL | values)
    assert train(cfg, jax.devices()[:1], quiet=True) == 0
    changed = to_dict(cfg) | {"steps": 6}
    changed["data"] |= {"stages": "plus 0.25, words 0.75"}
    branch = plan_branch(folder / "trunk", 4, folder / "branch", freeze(changed))
    assert create_branch(branch)
    assert train(branch.cfg, jax.devices()[:1], quiet=True) == 0
    last = read_metrics(folder / "branch" / "metrics.jsonl")[-1]
    assert last["step"] == 6 and last["eval/tokens"] > 0
    counted = [
        r for r in read_metrics(folder / "branch" / "metrics.jsonl") if "data/plus_tokens" in r
    ]
    assert counted[-1]["data/plus_tokens"] == 2 * 8 * 32 / 4
