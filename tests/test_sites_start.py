import dataclasses
import importlib
import json
from types import SimpleNamespace

import pytest

from jaxtrain.config.run_sections import SitesConfig
from jaxtrain.config.train_config import (
    OptimConfig,
    TrainConfig,
    config_hash,
    flatten,
    freeze,
)
from jaxtrain.sites.identity import SITE_FIELDS, STARTS, shared_fields
from jaxtrain.sites.outer_state import check_same_rounds
from jaxtrain.sites.start import read_membership
from jaxtrain.training import resume
from jaxtrain.training.resume import start_state

TWO = TrainConfig(sites=SitesConfig(period=10))


def sites_file(folder, processes=1):
    listed = [{"address": "127.0.0.1", "port": 7301 + i} for i in range(processes)]
    other = [{"address": "127.0.0.1", "port": 7401}]
    sites = [{"name": "a", "processes": listed}, {"name": "b", "processes": other}]
    path = folder / "sites.json"
    path.write_text(json.dumps({"version": 1, "job": "j", "key": "00" * 32, "sites": sites}))
    path.chmod(0o600)
    return str(path)


def test_a_period_a_sites_file_and_a_name_are_needed_together(tmp_path):
    path = sites_file(tmp_path)
    assert read_membership(TrainConfig(), "", "") is None
    member = read_membership(TWO, path, "b")
    assert member and (member.site, member.describe()) == (1, {"name": "b", "sites": ["a", "b"]})
    for given in ((TWO, "", ""), (TWO, path, ""), (TWO, "", "a"), (TrainConfig(), path, "a")):
        with pytest.raises(ValueError, match=r"--sites.period, --sites_file and --site; got"):
            read_membership(*given)


def test_the_file_must_list_this_runs_processes_and_the_site(tmp_path):
    with pytest.raises(ValueError, match="all processes of site a; got 2 in .*, and 1 in this run"):
        read_membership(TWO, sites_file(tmp_path, processes=2), "a")
    with pytest.raises(ValueError, match=r"--site must be one of \['a', 'b'\]; got 'c'"):
        read_membership(TWO, sites_file(tmp_path), "c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": SitesConfig(period=10, fragments=11)}, "sites.fragments must be at most"),
        ({"sites": SitesConfig(period=10, delay=10)}, "sites.delay must be below sites.period=10"),
        ({"sites": SitesConfig(period=10, blend=0.5)}, "sites.blend must be 0 with sites.delay=0"),
        ({"optim": OptimConfig(tail_average=0.1)}, "optim.tail_average must be 0"),
        ({"optim": OptimConfig(name="muown")}, "optim.name must not be muown"),
    ],
)
def test_a_config_that_several_sites_cannot_train_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TWO, **changes)


@pytest.mark.parametrize("name", ["gpt_124m", "llama_1400m"])
def test_the_manuals_period_suits_the_shipped_configs(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.sites.period = 30
    assert freeze(config).steps % 30  # the last round is shorter


def test_sites_may_differ_in_machine_and_step_counts_but_not_in_what_they_train():
    faster = dataclasses.replace(TWO, steps=400, save_every=7, sites=SitesConfig(period=20))
    assert shared_fields(faster) == shared_fields(TWO)
    longer = dataclasses.replace(TWO, steps=TWO.steps + 1)
    other = dataclasses.replace(TWO, seed=1, sites=SitesConfig(period=10, codec="int4"))
    different = lambda a: {k for k, v in shared_fields(a).items() if shared_fields(TWO)[k] != v}
    assert different(longer) == {"steps / sites.period"}
    assert different(other) == {"seed", "sites.codec"}


def test_fields_whose_names_begin_like_a_free_field_must_be_equal_at_all_sites():
    values = dict(attention_scale=0.125, attention_softcap=30.0, attention_bias="qkv")
    other = dataclasses.replace(TWO, model=dataclasses.replace(TWO.model, **values))
    changed = shared_fields(other).items() - shared_fields(TWO).items()
    assert {name for name, _ in changed} == {f"model.{name}" for name in values}


def test_fragments_must_start_at_the_same_fraction_of_each_sites_period():
    """Fragment 1 starts after step 7 of 15 or 15 of 30: an end after step 22 or 44 differs."""
    given = lambda steps, period, n: shared_fields(
        TrainConfig(steps=steps, sites=SitesConfig(period=period, fragments=n))
    )
    different = given(22, 15, 2).items() - given(44, 30, 2).items()
    assert dict(different) == {STARTS: '"0 7/15"'}
    assert given(44, 30, 2) == given(88, 60, 2) and given(22, 15, 1) == given(44, 30, 1)


def test_each_field_that_sites_or_a_hash_leave_out_exists():
    """A name that ends in a dot is that of a section; another one is that of one field."""
    names = flatten(TWO)
    for name in SITE_FIELDS:
        assert name in names or name.endswith(".") and any(k.startswith(name) for k in names), name


@pytest.mark.parametrize(
    ("name", "value"),
    [("period", 60), ("period", 0), ("fragments", 3), ("codec", "int4"), ("rate", 1.0)]
    + [("momentum", 0.0), ("error_decay", 1.0), ("delay", 0), ("blend", 0.5)],
)
def test_a_resumed_run_refuses_other_rounds_before_it_restores_anything(tmp_path, name, value):
    before = SitesConfig(period=30, codec="int8", delay=5)
    stored = flatten(TrainConfig(workdir=str(tmp_path), sites=before))
    checkpoints = SimpleNamespace(read_meta=lambda: {"config": stored})
    sites = dataclasses.replace(before, **{name: value})
    run = SimpleNamespace(cfg=TrainConfig(workdir=str(tmp_path), sites=sites))
    with pytest.raises(ValueError, match=rf"got sites.{name}={value!r}, not .*--sites.{name} as"):
        start_state(run, checkpoints, None, None)


def test_a_branch_of_a_two_site_run_may_train_alone(monkeypatch):
    stored = flatten(TrainConfig(sites=SitesConfig(period=30)))
    checkpoints = SimpleNamespace(read_meta=lambda: {"config": stored})
    monkeypatch.setattr(resume, "read_branch", lambda workdir: {"step": 90})
    with pytest.raises(AttributeError, match="'model'"):  # which it restores after the check
        start_state(SimpleNamespace(cfg=TrainConfig()), checkpoints, None, None)


def test_a_resumed_run_may_hide_the_exchange_for_longer_and_wait_less_long_for_a_site():
    stored = flatten(TrainConfig(sites=SitesConfig(period=30, delay=5)))
    values = dict(period=30, delay=29, grace=0, on_loss="fewer", lost_s=60.0)
    check_same_rounds(SitesConfig(**values), stored)
    check_same_rounds(SitesConfig(codec="int4"), flatten(TrainConfig()))  # unused on one site


def test_without_several_sites_their_fields_do_not_change_the_hash_of_a_config():
    assert config_hash(TrainConfig()) == config_hash(TrainConfig(sites=SitesConfig(codec="int2")))
    assert config_hash(TWO) != config_hash(TrainConfig())
