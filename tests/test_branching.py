"""Branches and averages of one small run, trained in this process."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import runs
from jaxtrain.branching.branch import create_branch, plan_branch
from jaxtrain.branching.merge import format_figures, merge
from jaxtrain.branching.schedule import check_stage_ends
from jaxtrain.checkpoint.integrity import read_record
from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.config.config_files import load_config_file
from jaxtrain.config.train_config import flatten, freeze, to_dict
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.interop.initial_state import initial_state
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.optim.schedule import build_schedule
from jaxtrain.run_directory.contents import load_train_config
from jaxtrain.run_directory.lineage import read_lineage
from jaxtrain.train import train
from jaxtrain.training.resume import start_state
from jaxtrain.training.run import build_run, restore_run

STEPS, EVERY, AT = 6, 2, 2
# An accelerated optimizer, so that the evaluated weights are not the parameters.
VALUES = {"steps": STEPS, "save_every": EVERY, "keep_every": EVERY, "log_every": 1}
VALUES |= {"optim__name": "adamw", "optim__accelerated": True, "optim__strength": 0.5}
VALUES |= {"optim__schedule": "constant", "sample__tokens": 0, "eval_tokens": 256, "model__L": 1}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    sums = [{"context": "1 plus 2 is", "choices": ["3", "4"], "label": label} for label in (0, 1)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sums))
    tasks = {"eval__tasks": f"sums='{folder}/sums.jsonl'"}
    cfg = runs.debug_config(folder / "trunk", runs.write_text(folder), **VALUES, **tasks)
    assert train(cfg, jax.devices()[:1], quiet=True) == 0
    return folder / "trunk"


def changed(trunk, **values):
    """Returns the trunk's config with some values changed; SECTION__FIELD is one of a section."""
    config = to_dict(load_train_config(trunk))
    for name, value in values.items():
        section, _, field = name.rpartition("__")
        (config[section] if section else config)[field] = value
    return freeze(config)


def begin(branch):
    """Returns the state and the batches with which a created branch begins."""
    cfg = branch.cfg
    run = build_run(cfg, jax.devices()[:1])
    corpus = open_corpus(cfg.data, "train", cfg.model.V, cfg.workdir)
    with (
        build_batches(cfg.data, corpus, run.mesh, cfg.seed) as batches,
        Checkpoints(branch.folder / "checkpoints", 1) as checkpoints,
    ):
        _, state, _ = start_state(run, checkpoints, batches, initial_state)
        return state, batches.step


def evaluated(workdir, step=None):
    _, state = restore_run(workdir, step)
    return eval_params(state.opt_state, state.params), state.params


def files_of(folder):
    """Returns the content of every file below a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def same(trunk):
    """A trained branch with the trunk's own config; the trunk stays as it was."""
    before = files_of(trunk)
    branch = plan_branch(trunk, AT, trunk.parent / "same", load_train_config(trunk))
    assert create_branch(branch)
    assert not create_branch(branch)  # a second start resumes it
    assert train(branch.cfg, jax.devices()[:1], quiet=True) == 0
    assert files_of(trunk) == before
    return branch


def test_a_branch_with_the_config_of_the_trunk_is_bitwise_the_trunk(trunk, same):
    assert runs.losses(same.folder) == runs.losses(trunk)[AT:]
    records = [read_record(run / "checkpoints" / str(STEPS)) for run in (trunk, same.folder)]
    assert records[0]["leaves"] == records[1]["leaves"]  # the digest of every array
    assert records[0]["meta"]["data"] == records[1]["meta"]["data"]


def test_a_branch_shares_the_files_of_the_checkpoint_and_records_it(trunk, same):
    lineage = read_lineage(same.folder)  # the training has rewritten config.json
    assert (lineage["parent"], lineage["step"], lineage["changes"]) == (str(trunk), AT, [])
    record = trunk / "checkpoints" / str(AT) / "record" / "metadata"
    assert lineage["checkpoint"] == json.loads(record.read_text())["sha256"]
    assert record.stat().st_nlink > 1


def test_a_decay_falls_from_the_peak_rate_over_a_share_of_the_steps(trunk):
    cfg = changed(trunk, optim__final_scale=0.1)
    branch = plan_branch(trunk, 4, trunk.parent / "new", cfg, decay=0.75)
    optim = branch.cfg.optim
    assert (branch.cfg.steps, optim.schedule, optim.total_steps) == (7, "wsd", 7)
    rates = [float(build_schedule(optim)(count)) for count in (3, 4, 5, 6, 7)]
    np.testing.assert_allclose(rates, [1, 1, 0.7, 0.4, 0.1], rtol=1e-6)
    exact = plan_branch(trunk, 4, trunk.parent / "new", cfg, decay_steps=3)
    assert exact.cfg == branch.cfg
    assert branch.lineage["decay_steps"] == 3 and not branch.lineage["new_data"]


def test_a_branch_with_another_batch_size_continues_after_the_sequences_that_were_read(
    trunk, tmp_path
):
    cfg = changed(trunk, data__batch=4)
    branch = plan_branch(trunk, AT, tmp_path / "small", cfg)
    create_branch(branch)
    state, batch = begin(branch)
    assert (int(state.step), batch) == (AT, AT * 8 // 4)


def test_a_branch_with_other_data_reads_them_from_the_beginning(trunk, tmp_path):
    branch = plan_branch(trunk, AT, tmp_path / "other", changed(trunk, seed=1))
    create_branch(branch)
    assert [int(x) for x in (begin(branch)[0].step, begin(branch)[1])] == [AT, 0]
    lineage = branch.lineage | {"new_data": False}  # as if no flag had changed them
    shutil.rmtree(branch.folder)
    create_branch(branch._replace(lineage=lineage))
    with pytest.raises(ValueError, match="resume on the data it began with.*seed=0, now 1"):
        begin(branch)


def test_another_optimizer_starts_from_the_evaluated_weights_at_the_position_in_the_data(
    trunk, tmp_path
):
    cfg = changed(trunk, optim__accelerated=False, optim__name="muon", optim__schedule="wsd")
    branch = plan_branch(trunk, AT, tmp_path / "muon", cfg)
    assert (branch.cfg.steps, branch.cfg.optim.total_steps) == (STEPS - AT, STEPS - AT)
    create_branch(branch)
    state, batch = begin(branch)
    want, params = evaluated(trunk, AT)
    assert not jax.tree.all(jax.tree.map(np.array_equal, want, params))
    jax.tree.map(np.testing.assert_array_equal, state.params, want)
    assert (int(state.step), batch) == (0, AT)


def test_what_cannot_be_branched_is_refused_before_anything_is_written(trunk, tmp_path):
    def refuse(match, at=AT, to=tmp_path / "new", cfg=None, **decay):
        with pytest.raises(ValueError, match=match):
            create_branch(plan_branch(trunk, at, to, cfg or load_train_config(trunk), **decay))

    refuse("--at must be a checkpoint that .* has kept: 2, 4, 6; got 3.*--keep_every", at=3)
    (tmp_path / "taken").mkdir()
    refuse("--to must be a new folder; .*taken exists", to=tmp_path / "taken")
    refuse("model.D=64, not 32.*Set --model.D", cfg=changed(trunk, model__D=64))
    refuse("folder of a branch is --to; got workdir=x", cfg=changed(trunk, workdir="x"))
    refuse("steps must be above --at=6", at=STEPS)
    refuse("one site; got sites.period=2", cfg=changed(trunk, sites__period=2))
    refuse("decay=0.1 and decay_steps=3", decay=0.1, decay_steps=3)
    refuse("at least one step; got 0.1 of --at=2", decay=0.1)
    refuse("decay sets steps.*got steps 9, was 6", cfg=changed(trunk, steps=9), decay=1.0)
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_a_decay_after_the_peak_rate_and_another_branch_in_the_folder_are_refused(trunk, same):
    stored = json.loads((trunk / "config.json").read_text())
    decaying = same.folder.parent / "decaying"
    shutil.copytree(trunk, decaying)
    stored["config"]["optim"] |= {"schedule": "wsd", "decay_fraction": 0.5}
    (decaying / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="at step 4 the rate of the run is 0.667 of it"):
        plan_branch(decaying, 4, "new", load_train_config(decaying), decay=0.5)
    shutil.rmtree(decaying)
    with pytest.raises(ValueError, match=r"that of the same branch; .*same is another one: step"):
        create_branch(plan_branch(trunk, 4, same.folder, load_train_config(trunk)))


def test_a_stage_that_was_read_must_end_where_it_ended(tmp_path):
    old, at = runs.debug_config(tmp_path, "text.txt", **VALUES), 4
    mixed = lambda end: dataclasses.replace(
        old.data, text="", mixture="a=x b=y", stages=f"a 0.9, b 0.1 until {end}; a 0.5, b 0.5"
    )
    check = lambda end, steps: check_stage_ends(
        dataclasses.replace(old, data=mixed(end), steps=steps),
        dataclasses.replace(old, data=mixed(end)),
        at,
    )
    with pytest.raises(ValueError, match="stage 1 .*50%, ends after step 3 of 6, .*step 4 of 8"):
        check("50%", 8)
    check("50%", STEPS)
    check("768", 8)  # tokens
    check("80%", 8)  # neither end was reached


def test_a_branch_that_lost_its_checkpoint_does_not_start_over(trunk, tmp_path):
    branch = plan_branch(trunk, AT, tmp_path / "lost", load_train_config(trunk))
    create_branch(branch)
    shutil.rmtree(branch.folder / "checkpoints")
    with pytest.raises(ValueError, match="must have the checkpoint that it began with, step 2"):
        begin(branch)


def test_the_folder_of_a_run_names_its_config(trunk):
    config, _ = load_config_file(str(trunk))
    assert flatten(freeze(config)) == flatten(load_train_config(trunk))
    config.steps = 9
    assert config.optim.total_steps == 9  # follows --steps, as in the config that was trained


@pytest.fixture(scope="module")
def merged(trunk):
    """The folder of an average of the trunk's checkpoints, and the figures of both."""
    to = trunk.parent / "merged"
    return to, merge(trunk, [4, 2, 6], "linear", to)


def test_an_average_is_that_of_the_evaluated_weights_and_a_run_of_its_own(trunk, merged, tmp_path):
    steps, (to, figures) = [2, 4, 6], merged
    parts = [evaluated(trunk, step)[0] for step in steps]
    average = lambda *x: np.average(np.array(x, np.float64), 0, [1, 2, 3]).astype(np.float32)
    mean = jax.tree.map(average, *parts)
    got, params = evaluated(to)
    # A weighted sum may round to the neighbour of the rounded mean.
    jax.tree.map(lambda a, b: np.testing.assert_array_max_ulp(a, np.asarray(b), 1), mean, got)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    logged = runs.read_metrics(trunk / "metrics.jsonl")[-1]  # of one device; here are several
    want = {name: value for name, value in logged.items() if name.startswith("eval/")}
    assert figures["last"] == pytest.approx(want, rel=1e-5)
    assert read_lineage(to)["steps"] == steps
    text = format_figures(steps, [1 / 3] * 3, figures)
    assert f"{figures['merge']['eval/loss_nats']:10.4f}" in text
    assert f"step 6   tasks: sums {100 * want['eval/sums_accuracy']:.1f}" in text
    assert "average  tasks: sums " in text and "eval/sums_accuracy" in figures["merge"]
    with pytest.raises(ValueError, match="--to must be a new folder"):
        merge(trunk, steps, "uniform", to)
    with pytest.raises(ValueError, match="--steps must be a checkpoint .* kept: 2, 4, 6; got 5"):
        merge(trunk, [2, 5], "uniform", tmp_path / "new")
    with pytest.raises(ValueError, match="two or more different"):
        merge(trunk, [2, 2], "uniform", tmp_path / "new")
    with pytest.raises(ValueError, match="does not exist. Set --tasks"):
        merge(trunk, steps, "uniform", tmp_path / "new", tasks="gone=/no/such.jsonl")


def test_an_average_can_be_branched(merged, tmp_path):
    folder, _ = merged
    cfg = dataclasses.replace(load_train_config(folder), steps=8)
    branch = plan_branch(folder, STEPS, tmp_path / "on", cfg)
    create_branch(branch)
    state, batch = begin(branch)
    assert (int(state.step), batch) == (STEPS, STEPS)
    assert read_lineage(branch.folder)["parent"] == str(folder)
