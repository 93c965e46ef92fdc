import json
import sys

import pytest

from jaxtrain import bench
from jaxtrain.files import strict_json


def test_rows_are_written_as_lines_of_json(tmp_path, monkeypatch, capsys):
    suite = lambda args, rounds: [([{"suite": "x", "rounds": rounds}], "the table")]
    monkeypatch.setitem(bench.SUITES, "dispatch", suite)
    bench.main(["--suite=dispatch", "--rounds=3", f"--json={tmp_path / 'rows.jsonl'}"])
    about, row = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row.pop("date")[:10] == about["date"][:10] and row.pop("commit") == about["commit"]
    assert row == {"suite": "x", "rounds": 3}
    assert about == json.loads(strict_json(about)) and about["versions"]["jax"]
    assert "== dispatch\nthe table" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag, error",
    [
        ("--suite=tpu", "'cpu'"),
        ("--sizes=s,xl", "--sizes of suite cpu must be of s, m, separated by commas; got xl"),
        ("--suite=optimizer --sizes=xl", "suite optimizer must be of s, m, 124m, separated"),
        ("--suite=cpu --sizes=124m", "suite cpu must be of s, m, separated by commas; got 124m"),
        ("--rounds=0", "--rounds: must be a positive integer; got 0"),
        ("--suite=gpu --rows=0", "--rows: must be a positive integer; got 0"),
        ("--suite=gpu --rows=3", "--rows must be a power of two; got 3"),
        ("--suite=gpu --seconds=0", "--seconds: must be a positive number; got 0"),
        ("--suite=gpu --seconds=inf", "--seconds: must be a positive number; got inf"),
        ("--suite=gpu --minutes=nan", "--minutes: must be a positive number; got nan"),
    ],
)
def test_a_wrong_flag_is_an_error_that_lists_what_is_allowed(flag, error, capsys):
    with pytest.raises(SystemExit):
        bench.parse(flag.split())
    assert error in capsys.readouterr().err


def test_help_explains_every_suite(capsys):
    with pytest.raises(SystemExit) as status:
        bench.parse(["--help"])
    shown = capsys.readouterr().out
    assert status.value.code == 0
    assert all(f"\n    {name} " in shown for name in bench.SUITES)


@pytest.mark.parametrize(
    "suite, variants", [("cpu", "jaxtrain"), ("optimizer", "jaxtrain,optax"), ("gpu", "jaxtrain")]
)
def test_without_torch_the_error_names_the_extra_and_the_flag(suite, variants, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "jaxtrain.crosscheck.torch_model", raising=False)
    with pytest.raises(SystemExit, match=f"jaxtrain\\[crosscheck\\].*--variants={variants}"):
        bench.main([f"--suite={suite}", "--tiny", "--json=/dev/null"])


@pytest.mark.parametrize("text", ["{", "[]", '{"what": "step"}\n{"ste'])
def test_a_damaged_file_of_rows_cannot_be_resumed(text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit, match="--resume .* --json; got .*rows.jsonl"):
        bench.main(["--suite=gpu", "--tiny", "--resume", f"--json={path}"])


def test_an_interrupted_suite_ends_in_one_line(monkeypatch, capsys):
    def interrupted(args, rounds):
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.SUITES, "dispatch", interrupted)
    with pytest.raises(SystemExit) as stop:
        bench.main(["--suite=dispatch"])
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err
