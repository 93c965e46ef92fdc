"""Runs with damaged or hostile files: an error names the file, or the value is left out."""

import json

import pytest
from run_directories import series, write_run

from launch import slo, summary

HUGE = 10**400
FORGED = "x\nlaunch: job 1: exit 0"


def change(path, keys, value, line=0):
    """Replaces a value in a JSON file, or in a line of a JSON-lines file."""
    lines = path.read_text().splitlines()
    found = part = json.loads(lines[line])
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    lines[line] = json.dumps(found)
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    run = write_run(folder / "run", series(60))
    with pytest.MonkeyPatch.context() as patch:  # the simulation takes seconds
        patch.setattr("launch.report.power.DRAWS", 10)
        assert slo.main(["record", str(run), "--provisional", f"--out={folder}/base.json"]) == 0
    return folder / "base.json"


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("config.json", ("chip",), "A40"),
        ("config.json", ("chip", "hbm_bytes"), 0),
        ("config.json", ("chip", "name"), FORGED),
        ("config.json", ("config", "steps"), HUGE),
        ("config.json", ("config", "data", "batch"), None),
        ("config.json", ("config_hash",), FORGED),
        ("config.json", ("devices",), 0),
        ("config.json", ("work", "tokens_per_step"), "x"),
        ("config.json", ("routes",), "x"),
        ("config.json", ("versions",), None),
        ("metrics.jsonl", ("step",), None),
        ("metrics.jsonl", ("step",), HUGE),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_file(
    tmp_path, capsys, baseline, name, keys, value
):
    run = write_run(tmp_path / "run", series(60))
    change(run / name, keys, value)
    assert summary.main([str(run)]) == 1
    assert slo.main(["check", str(run), f"--against={baseline}"]) == 2
    printed = capsys.readouterr()
    errors = printed.err.splitlines()
    assert not printed.out and len(errors) == 2
    assert all(error.startswith(f"error: {run / name}") for error in errors)


@pytest.mark.parametrize("value", [HUGE, 1e300, "x", [], {}, None, True])
def test_a_value_of_a_step_that_is_no_number_is_left_out(tmp_path, capsys, baseline, value):
    run = write_run(tmp_path / "run", series(60), processes=2)
    for metric in ("train/loss_nats", "comm/wire_bytes", "eval/x_accuracy", "perf/pause_x_s"):
        change(run / "metrics.jsonl", (metric,), value, line=20)
    change(run / "hosts" / "0.jsonl", ("perf/step_time_s",), value, line=20)
    change(run / "metrics.jsonl", ("time",), value, line=60)
    (run / "summary.json").unlink()
    assert summary.main([str(run)]) == 0 and "wire bytes a step" in capsys.readouterr().out
    across = "--across=hosts,processes"
    assert slo.main(["check", str(run), f"--against={baseline}", across]) in (0, 1, 3)


@pytest.mark.parametrize(
    ("key", "value"),
    [("lost_s", "x"), ("lost_s", {"save": HUGE}), ("stopped_by", FORGED), ("perf/wall_s", "x")],
)
def test_a_wrong_summary_is_ignored_with_a_warning(tmp_path, capsys, key, value):
    run = write_run(tmp_path / "run", series(60))
    change(run / "summary.json", (key,), value)
    assert summary.main([str(run)]) == 0
    assert capsys.readouterr().err.startswith(f"warning: {run}/summary.json is not a run's")


def test_the_text_of_a_run_cannot_look_like_a_line_of_the_launcher(tmp_path, capsys):
    run = write_run(tmp_path / "run", series(60), versions={FORGED: FORGED}, lineage={"parent": 3})
    change(run / "summary.json", ("outliers",), {FORGED: 3})
    assert summary.main([str(run)]) == 0
    printed = capsys.readouterr().out
    assert "\nlaunch: job" not in printed and r"x\nlaunch: job 1" in printed
