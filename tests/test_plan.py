import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import xla_flags

from configs import llama_1400m
from jaxtrain.config.train_config import freeze
from jaxtrain.planning.calibration import Calibration
from jaxtrain.planning.hardware import build_hardware
from pallas_kernels.chip import find_chip

PLATFORMS = os.environ["JAX_PLATFORMS"]
from jaxtrain import plan  # noqa: E402

os.environ["JAX_PLATFORMS"] = PLATFORMS  # the command sets it


@pytest.mark.long
def test_a_plan_over_hosts_reports_memory_communication_and_routes(tmp_path):
    for name, reason in (("cramjam", "offline extra"), ("jax_cuda12_plugin", "GPU compiler")):
        pytest.importorskip(name, reason=f"the {reason} is missing")
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    env["XLA_FLAGS"] = xla_flags.QUICK_GPU
    argv = [sys.executable, "-m", "jaxtrain.plan", "debug", "--gpus=2", "--hosts=2", "--json"]
    argv += ["--model.L=1"]  # compiles fastest
    argv += [f"--calibrated={tmp_path / 'calibration.json'}"]
    half = {"products": 0.5, "attention": 0.5, "memory": 0.5}
    calibration = Calibration("a40", half, 0.0, (), 3, {})
    (tmp_path / "calibration.json").write_text(json.dumps(calibration._asdict()))
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    memory = figures["memory_bytes"]
    assert figures["devices"] == 4 and figures["hosts"] == 2 and figures["fits"]
    # Muon has one number of state per matrix weight, AdamW two per other weight; both are sharded
    # over 4 devices.
    assert figures["parameters"] / memory["parameters"] == pytest.approx(1, rel=0.3)
    assert memory["parameters"] <= memory["optimizer state"] <= 2.2 * memory["parameters"]
    assert 0 < memory["parameters"] + memory["optimizer state"] < memory["peak"]
    kinds = {row["kind"] for row in figures["collectives"]}
    assert {"all-gather", "all-to-all"} <= kinds  # gathers parameters, sends matrices to owners
    assert all(row["crosses_hosts"] and row["seconds"] > 0 for row in figures["collectives"])
    assert figures["step_s"] > figures["roofline_s"] > 0
    assert figures["routes"]["attention"]
    assert sum(figures["class_s"].values()) == pytest.approx(figures["roofline_s"])
    # Half the speed doubles the roofline's part of the step and leaves the communication as it is.
    slower_s = figures["calibrated"]["step_s"] - figures["step_s"]
    assert slower_s == pytest.approx(figures["roofline_s"])


def test_a_missing_config_and_an_unknown_chip_are_errors_that_name_the_remedy():
    args = dict(table=False, config=None, compare=[], chip="b300", calibrated="", sites=[])
    with pytest.raises(ValueError, match="a config must be named, such as gpt_124m.*--table"):
        plan.run_command(SimpleNamespace(**args))
    with pytest.raises(ValueError, match="is for the plan of one setting; got --fit too"):
        plan.run_command(SimpleNamespace(**args | {"calibrated": "x", "formula": False, "fit": 1}))
    with pytest.raises(ValueError, match="got 'b300'"):
        plan.run_command(SimpleNamespace(**args | {"config": llama_1400m.get_config()}))


@pytest.mark.parametrize(("accumulation", "status"), [(64, 0), (1, 1)])
def test_the_memory_formula_prints_its_error_bound_and_whether_the_config_fits(
    accumulation, status, capsys
):
    config = llama_1400m.get_config()
    config.accumulation = accumulation
    hardware = build_hardware(find_chip("a40"), 1, 1, "", "ethernet10")
    estimate = lambda json: plan.print_estimate(
        freeze(config), hardware, SimpleNamespace(json=json)
    )
    assert estimate(False) == status
    text = capsys.readouterr().out
    assert "right to 10% of the peak or 0.5 GiB" in text
    assert ("Does not fit" in text) == bool(status)
    assert estimate(True) == status
    assert json.loads(capsys.readouterr().out)["fits"] == (not status)
