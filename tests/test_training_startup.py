"""What a run prints when it starts, and what it stores in config.json instead."""

import json

import jax
import pytest

import runs
from jaxtrain.model.trees import named_leaves
from jaxtrain.train import train
from jaxtrain.training.run import build_run
from jaxtrain.training.startup import describe_program, machine_notes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("startup")
    runs.write_text(folder)
    return folder


def config(folder, **values):
    values = {"steps": 2, "log_every": 2, "sample__tokens": 0} | values
    return runs.debug_config(values.pop("workdir", folder / "run"), folder / "text.txt", **values)


def start_of(out) -> list[str]:
    """Returns the lines that were printed before the step was compiled."""
    lines = out.splitlines()
    return lines[: next(i for i, line in enumerate(lines) if line.startswith("compiled in"))]


def test_a_run_prints_six_lines_at_its_start_and_config_json_has_the_rest(
    folder, capsys, monkeypatch
):
    # Else an installed CUDA plugin adds a warning.
    monkeypatch.setattr("jaxtrain.training.run.WANTS_GPU", False)
    cfg = config(folder, optim__geometry="frobenius")  # compiles faster than Newton-Schulz
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


@pytest.mark.long
def test_details_of_routes_optimizer_groups_measurements_and_mesh_are_printed_on_request(
    folder, capsys
):
    values = {"measure__details": True, "steps": 1, "workdir": str(folder / "mesh")}
    values |= {"model__L": 1, "mesh__fsdp": 2, "mesh__replica": 2}
    cfg = config(folder, optim__name="adamw", **values)  # compiles fastest
    assert train(cfg, jax.devices()[:4]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "devices   4 x cpu: replica 2, fsdp 2, float32" in lines
    assert any(line.startswith("route") and "unroll=1" in line for line in lines)
    assert any(line.startswith("optim") and "blocks.mlp.up.w" in line for line in lines)
    assert any(line.startswith("measure") and "no MFU" in line for line in lines)
    notes = json.loads((folder / "mesh" / "config.json").read_text())["notes"]
    assert notes == machine_notes(build_run(cfg, jax.devices()[:4]))
    muon = build_run(config(folder, **values), jax.devices()[:4])
    assert any("whole matrices on each device" in note for note in machine_notes(muon))


def test_processes_compare_every_line_of_their_code_and_their_libraries(tmp_path):
    source = tmp_path / "jaxtrain" / "training" / "step.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    before = describe_program(tmp_path)
    assert f"jax {jax.__version__}" in before and describe_program(tmp_path) == before
    source.write_text("x = 2\n")
    assert describe_program(tmp_path) != before
