"""Command lines name a config and set its fields; each error is one line."""

import os
import sys
from pathlib import Path

import pytest
import xla_flags
from flag_scenes import exit_status, fresh_flags

import runs
from jaxtrain import evaluate, train
from jaxtrain.config import config_files
from jaxtrain.config import train_config as config_lib
from jaxtrain.config.command_line import CommandForm, parse
from jaxtrain.errors import REFUSED
from jaxtrain.study import __main__ as study
from launch import run as launch_run

FORM = CommandForm("train", "", train.define_flags, config="must")


def read(*argv):
    """Returns FLAGS.config for a command line of `train`, and the remaining words."""
    with fresh_flags() as values:
        words = parse(FORM, "jaxtrain train", list(argv))
        return values.config, words


def read_error(capsys, *argv) -> str:
    """Returns the error of a command line that `train` refuses."""
    with fresh_flags():
        assert exit_status(parse, FORM, "jaxtrain train", list(argv)) == REFUSED
    return capsys.readouterr().err


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(
    "argv",
    [
        ("debug",),
        ("debug.py",),
        ("configs/debug.py",),
        ("--config=debug",),
        ("--config", "debug"),
        ("-config=configs/debug.py",),
        ("--config=configs/debug",),
        (str(runs.ROOT / "configs" / "debug.py"),),
    ],
)
def test_a_shipped_config_is_found_by_its_name_from_any_folder(
    argv, elsewhere, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path if elsewhere else runs.ROOT)
    config, words = read(*argv)
    assert config.workdir == "runs/debug" and words == []


def write_config(path, workdir):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "from configs import debug\n\n\ndef get_config():\n    config = debug.get_config()\n"
        f"    config.workdir = {workdir!r}\n    return config\n"
    )


def test_a_file_of_the_user_comes_first_if_the_name_looks_like_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "debug.py", "mine")
    (tmp_path / "quickstart").mkdir()
    assert read("debug.py")[0].workdir == read("./debug.py")[0].workdir == "mine"
    assert read("debug")[0].workdir == "runs/debug"
    assert read("quickstart")[0].workdir == "runs/quickstart"


def test_a_folder_called_configs_does_not_hide_the_shipped_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_config(tmp_path / "configs" / "my run é.py", "mine")
    assert read("configs/my run é.py")[0].workdir == "mine"
    assert read("configs/debug.py")[0].workdir == "runs/debug"


def test_a_config_in_a_folder_called_configs_can_import_modules_of_that_folder(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "configs" / "shared_by_two.py", "shared")
    (tmp_path / "configs" / "importing.py").write_text(
        "from configs import shared_by_two\n\nget_config = shared_by_two.get_config\n"
    )
    monkeypatch.delitem(sys.modules, "configs.shared_by_two", raising=False)
    assert read("configs/importing.py")[0].workdir == "shared"
    read("debug")  # makes `configs` the shipped package again


@pytest.mark.parametrize(
    "argv",
    [
        ("debug", "--steps=7", "--optim.learning_rate=0.5", "--strict", "--data.text=a b"),
        (
            "--steps",
            "7",
            "--optim.learning_rate",
            "5e-1",
            "--strict",
            "debug",
            "--data.text",
            "a b",
        ),
        ("--config.steps=7", "--config.optim.learning_rate=.5", "--config.strict=1", "debug")
        + ("--config.data.text=a b",),
        ("--config.strict", "-steps=7", "--data.text=a b", "--optim.learning_rate=0.5")
        + ("--config=debug",),
    ],
)
def test_fields_can_be_set_by_flags_of_every_form_in_any_order(argv):
    config, words = read(*argv)
    cfg = config_lib.freeze(config)
    assert words == []
    assert (cfg.steps, cfg.optim.learning_rate, cfg.strict, cfg.data.text) == (7, 0.5, True, "a b")
    assert cfg.optim.total_steps == 7


@pytest.mark.parametrize("flag", ["--nomodel.qk_norm", "--noconfig.model.qk_norm"])
def test_the_prefix_no_sets_a_boolean_field_to_false(flag):
    assert read("debug")[0].model.qk_norm
    assert not read("debug", flag)[0].model.qk_norm
    assert not read("debug", "--model.qk_norm=false")[0].model.qk_norm


def test_the_last_of_two_values_counts_and_a_value_may_be_negative():
    config, _ = read("debug", "--seed=1", "--config.seed", "2", "--mesh.fsdp", "-1", "--")
    assert config.seed == 2 and config.mesh.fsdp == -1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("debug", "--steps=-1"), "steps must be at least 1; got -1. Set --steps."),
        (("debug", "--config.steps=-1"), "steps must be at least 1; got -1. Set --config.steps."),
        (("debug", "--steps=ten"), "steps must be a whole number; got 'ten'. Set --steps."),
        (("debug", "--data.batch=8.5"), "data.batch must be a whole number; got '8.5'."),
        (("debug", "--strict=maybe"), "strict must be true or false; got 'maybe'. Set --strict."),
        (("debug", "--optim.name=mun"), "optim.name must be one of 'muon', "),
        (("debug", "--nostrict=true"), "--nostrict takes no value; got 'true'. Set --strict=true."),
        (
            ("debug", "\u2014steps=3"),
            "\u2014steps=3 begins with a typographic dash. Write --steps=3.",
        ),
        (
            ("debug", "\u2013steps=3"),
            "\u2013steps=3 begins with a typographic dash. Write --steps=3.",
        ),
        (("debug", "--steps"), "--steps needs a value. Write --steps=VALUE."),
        (("debug", "--steps", "--seed=1"), "--steps needs a value."),
        (("debug", "--step=1"), "unknown flag --step. Did you mean --steps?"),
        (("--stepz=1",), "unknown flag --stepz. Did you mean --steps?"),
        (("debug", "--batch=1"), "unknown flag --batch. Did you mean --data.batch?"),
        (
            ("debug", "--config.modle.L=1"),
            "unknown flag --config.modle.L. Did you mean --config.model.L?",
        ),
        (("debug", "--zzz=1"), "unknown flag --zzz. See jaxtrain train --help."),
        (("debug", "--processes=0"), "--processes must be a positive integer; got '0'."),
        (("debug", "quickstart"), "jaxtrain train takes one config; got debug, quickstart."),
        (
            ("debug", "--config=quickstart"),
            "jaxtrain train takes one config; got quickstart, debug.",
        ),
        (("nosuch/mine.py",), "no config is called nosuch/mine.py, and there is no such file."),
        (("configs/degub.py",), "no config is called configs/degub.py, and there is no such file."),
        (("quikstart",), "no config is called quikstart. Did you mean quickstart?"),
        ((".",), "no config is called ."),
        (
            ("configs/",),
            "a config must be a file, or a run's folder with config.json; got the folder configs/.",
        ),
    ],
)
def test_the_error_of_a_bad_command_line_names_what_the_user_typed(
    argv, message, capsys, monkeypatch
):
    monkeypatch.chdir(runs.ROOT)
    assert read_error(capsys, *argv).startswith(f"error: {message}")


@pytest.mark.parametrize("argv", [(), ("--steps=3",), ("quikstart",)])
def test_without_a_known_config_the_error_lists_the_shipped_configs_and_a_command(argv, capsys):
    lines = read_error(capsys, *argv).splitlines()
    assert "  quickstart   A byte-level model" in "\n".join(lines)
    listed = {line.split()[0] for line in lines if line.startswith("  ")}
    assert listed == set(config_files.shipped_configs("train"))
    assert {"debug", "gpt_124m", "llama_1400m"} <= listed
    assert not listed & {"base", "gpt2", "study"}
    assert any(line.endswith("jaxtrain train quickstart") for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "mine.py: a config must define get_config(); got AttributeError"),
        ("\ndef get_config(:\n", "mine.py, line 2: a config must define get_config(); got Syntax"),
        ("def get_config():\n    return nosuch\n", "mine.py, line 2: "),
        ("def get_config():\n    return None\n", "mine.py: get_config() must return a ConfigDict"),
        ("import nosuch_module\n", "mine.py, line 1: "),
        ("import sys\nsys.exit(3)\n", "mine.py, line 2: a config must define get_config(); got S"),
        (
            "from configs import debug\ndef get_config():\n    c = debug.get_config()\n"
            "    c.unlock()\n    c.stepz = 4\n    return c\n",
            "mine.py: config has no field stepz. Did you mean steps?",
        ),
    ],
)
def test_the_error_of_a_broken_config_file_names_the_file_and_the_line(
    text, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(text)
    error = read_error(capsys, "mine.py")
    assert error.startswith(f"error: {message}") and len(error.splitlines()) == 1


def test_the_error_of_a_bad_value_names_its_field_not_one_that_follows_it():
    config, _ = read("debug")
    config.steps = -1
    with pytest.raises(ValueError, match="^steps must be at least 1; got -1. Set --steps.$"):
        config_lib.freeze(config)


@pytest.mark.parametrize("flag", ["--optim.learning_rate=1", "--config.steps=2", "--config=debug"])
def test_a_command_without_a_config_refuses_the_fields_of_configs(flag, capsys):
    with fresh_flags():
        assert exit_status(evaluate.command, ["--run=runs/a", flag]) == REFUSED
    assert "error: unknown flag --" in capsys.readouterr().err


def test_a_field_set_for_a_study_applies_to_all_its_runs(capsys):
    argv = ["study_quick", "--steps=9", "--base.seed=3", "--study.seeds=4,5,6"]
    argv += ["--study.grid.adamw.optim.adam_learning_rate=0.1,0.2"]
    argv += ["--study.level=0.01", "--study.horizons=1,2"]  # the config file does not set these
    with fresh_flags() as flags:
        assert parse(study.form(), "jaxtrain study", argv) == []
        values = flags.config
    assert (values.base.steps, values.base.seed, values.study.seeds) == (9, 3, (4, 5, 6))
    assert values.base.optim.total_steps == 9
    assert values.study.grid.adamw.optim.adam_learning_rate == (0.1, 0.2)
    assert (values.study.level, values.study.horizons) == (0.01, (1, 2))
    with fresh_flags():
        assert exit_status(study.command, ["study_quick", "--steps=-9"]) == 1
    assert "steps must be at least 1; got -9. Set --steps." in capsys.readouterr().err


def test_the_arguments_after_the_dashes_of_launch_are_a_command_line_of_train():
    argv = ["--hosts=h.toml", "--", "gpt_124m", "--steps=5", "--workdir", "/shared/run"]
    _, flags = launch_run.parse(argv, "jaxtrain launch")
    config, _ = read(*flags)
    assert (config.steps, config.workdir) == (5, "/shared/run")


@pytest.mark.long
def test_a_config_is_trained_by_its_name_from_another_folder(tmp_path):
    argv = ["train", "--steps", "2", "debug", "--workdir=a run", "--sample.tokens=0"]
    argv += ["--data.text=text é.txt", "--compile_cache="]
    argv += ["--model.L=1", "--model.D=8", "--optim.name=adamw"]  # to compile faster
    (tmp_path / "text é.txt").write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(999)))
    flags = {"XLA_FLAGS": xla_flags.flags(devices=1)}  # compiles faster than for 8
    runs.finish(runs.fork_cli(*argv, cwd=tmp_path, env=os.environ | flags))
    assert Path(tmp_path, "a run", "summary.json").exists()


@pytest.mark.parametrize(
    ("typed", "field"),
    [("lr", "optim.learning_rate"), ("batch_size", "data.batch"), ("max_steps", "steps")],
)
def test_a_flag_named_as_in_other_stacks_is_answered_with_our_name(typed, field, capsys):
    with pytest.raises(SystemExit):
        read("debug", f"--{typed}=1")
    assert f"unknown flag --{typed}. Did you mean --{field}?" in capsys.readouterr().err
