"""What a run prints at its start, and what it stores instead."""

import json

import jax
import pytest
import runs

from configs import debug
from jaxtrain.config import train_config as config_lib
from jaxtrain.model.trees import named_leaves
from jaxtrain.train import train
from jaxtrain.training.run import build_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("about")
    runs.write_text(folder)
    return folder


def config(folder, **values):
    config = debug.get_config()
    config.update({"workdir": str(folder / "run"), "steps": 2, "log_every": 2})
    config.data.text, config.sample.tokens = str(folder / "text.txt"), 0
    for name, value in values.items():
        section, _, field = name.rpartition("__")
        setattr(config[section] if section else config, field, value)
    return config_lib.freeze(config)


def start_of(out) -> list[str]:
    """The lines before the compilation's."""
    lines = out.splitlines()
    return lines[: next(i for i, line in enumerate(lines) if line.startswith("compiled in"))]


def test_the_start_of_a_run_is_a_few_lines_and_config_json_has_the_rest(
    folder, capsys, monkeypatch
):
    # Whatever plugins are installed here.
    monkeypatch.setattr("jaxtrain.training.run.WANTS_GPU", False)
    cfg = config(folder)
    assert train(cfg, jax.devices()[:1]) == 0
    out = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in start_of(out))
    assert list(rows) == ["model", "data", "tokens", "devices", "routes", "run"]
    assert rows["model"].startswith("35,008 parameters: 2 layers of width 32, 4:2 heads")
    assert rows["tokens"] == "512 in 2 steps of 8 x 32"
    assert rows["devices"] == "1 x cpu, float32"
    assert rows["routes"] == "all by XLA"
    assert rows["run"] == str((folder / "run").resolve())
    assert "eval_params" not in out and "no MFU" not in out
    stored = json.loads((folder / "run" / "config.json").read_text())
    run = build_run(cfg, jax.devices()[:1])
    groups = {row["name"]: row for row in stored["optimizer_groups"]}
    assert groups.keys() == named_leaves(run.model.axes).keys()
    assert groups["blocks.mlp.up.w"]["optimizer"] == "muon" and groups["embed"]["rate"] == 0.003
    assert stored["routes"].keys() == run.routes.keys()
    assert stored["mesh"] == {"replica": 1, "fsdp": 1, "tensor": 1}
    assert any("no MFU, no MBU: 'cpu' has no peak" in line for line in stored["measures"])


def test_details_are_printed_when_asked_for(folder, capsys):
    assert train(config(folder, measure__details=True, steps=3), jax.devices()[:1]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("route") and "unroll=2" in line for line in lines)
    assert any(line.startswith("optim") and "blocks.mlp.up.w" in line for line in lines)
    assert any(line.startswith("measure") and "no MFU" in line for line in lines)


def test_a_mesh_is_printed_by_its_axes(folder, capsys):
    cfg = config(folder, mesh__fsdp=2, mesh__replica=2, steps=1, workdir=str(folder / "mesh"))
    assert train(cfg, jax.devices()[:4]) == 0
    assert "devices   4 x cpu: replica 2, fsdp 2, float32" in capsys.readouterr().out
    notes = json.loads((folder / "mesh" / "config.json").read_text())["notes"]
    assert any("whole matrices on each device" in note for note in notes)
