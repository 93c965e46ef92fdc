"""Files and runs that no baseline can come from."""

import json

import pytest
from run_directories import series, write_run

from launch import slo

PRICES = "--prices=docs/prices.toml"


@pytest.fixture
def base(tmp_path):
    run = write_run(tmp_path / "a", series(60))
    assert slo.main(["record", str(run), "--provisional", f"--out={tmp_path}/base.json"]) == 0
    return tmp_path / "base.json"


def test_a_run_that_is_given_twice_is_refused_because_its_spread_would_be_0(tmp_path, capsys):
    run = write_run(tmp_path / "a", series(60))
    runs = [str(run), f"{run}/", str(run / "hosts" / "..")]
    assert slo.main(["record", *runs, f"--out={tmp_path}/b.json"]) == 2
    assert "each RUN must be given once; got a twice" in capsys.readouterr().err


@pytest.mark.parametrize("step_s", [-1.0, 1e-320])
def test_a_run_whose_clock_did_not_advance_is_refused(tmp_path, capsys, step_s):
    run = write_run(tmp_path / "a", [step_s] * 60)
    assert slo.main(["record", str(run), "--provisional", f"--out={tmp_path}/b.json"]) == 2
    assert "must have positive step times" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"figures": {"zz": {"value": 1, "bound": 1, "how": ""}}},
        {"figures": {"goodput": {"value": "x", "bound": None, "how": ""}}},
        {"figures": {"goodput": {"value": 1.0, "bound": 0.0, "how": ""}}},
        {"figures": {"goodput": {"value": 10**400, "bound": None, "how": ""}}},
        {"figures": []},
        {"key": {}},
        {"recorded": "today"},
        {"recorded": 1e30},
        {"runs": [1]},
    ],
)
def test_a_baseline_that_was_edited_is_refused(tmp_path, base, capsys, change):
    base.write_text(json.dumps(json.loads(base.read_text()) | change))
    assert slo.main(["check", str(tmp_path / "a"), f"--against={base}"]) == 2
    assert slo.main(["price", f"--against={base}", PRICES]) == 2
    assert "must be as `launch.slo record` wrote it" in capsys.readouterr().err


def test_json_that_is_nested_too_deeply_is_refused_by_its_name(tmp_path, base, capsys):
    base.write_text("[" * 100_000)
    assert slo.main(["check", str(tmp_path / "a"), f"--against={base}"]) == 2
    (tmp_path / "a" / "config.json").write_text("[" * 100_000)
    assert slo.main(["check", str(tmp_path / "a"), f"--against={base}"]) == 2
    assert "--against must be a file of" in capsys.readouterr().err


def test_a_price_needs_tokens_per_second(base, capsys):
    baseline = json.loads(base.read_text())
    del baseline["figures"]["tokens_per_s"]
    base.write_text(json.dumps(baseline))
    assert slo.main(["price", f"--against={base}", PRICES]) == 2
    assert "--against must have tokens/s" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--params=-1", "--tokens=nan"])
def test_a_price_of_a_number_that_is_not_positive_is_refused(base, capsys, flag):
    with pytest.raises(SystemExit):
        slo.main(["price", f"--against={base}", PRICES, flag, "--deadline=7d"])
    assert "must be a positive number" in capsys.readouterr().err
