import dataclasses
import importlib
import json

import pytest

from jaxtrain.config.run_sections import SitesConfig
from jaxtrain.config.train_config import (
    OptimConfig,
    TrainConfig,
    config_hash,
    freeze,
    shared_fields,
)
from jaxtrain.sites.start import read_membership

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


def test_without_several_sites_their_fields_do_not_change_the_hash_of_a_config():
    assert config_hash(TrainConfig()) == config_hash(TrainConfig(sites=SitesConfig(codec="int2")))
    assert config_hash(TWO) != config_hash(TrainConfig())
