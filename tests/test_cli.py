"""The `jaxtrain` command: its lists, help texts and examples are correct as printed."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import logging
from flag_scenes import exit_status, fresh_flags

from jaxtrain import cli
from jaxtrain.config.commands import BY_NAME, COMMANDS, rewrite_commands
from jaxtrain.config.train_config import TrainConfig, to_config_dict
from jaxtrain.errors import INTERRUPTED, REFUSED

ROOT = Path(__file__).parent.parent
NAMES = [command.name for command in COMMANDS]
# For commands that use argparse: the function that only parses their arguments.
PARSE = {
    "encode": ("jaxtrain.data.encode", "_parse"),
    "profile": ("jaxtrain.profile", "parse"),
    "bench": ("jaxtrain.bench", "parse"),
    "doctor": ("jaxtrain.doctor.__main__", "parse"),
    "summary": ("launch.summary", "parse"),
    "compare": ("launch.compare", "parse"),
    "launch": ("launch.run", "parse"),
    "slo": ("launch.slo", "parse"),
    "export": ("jaxtrain.interop.__main__", "_parse"),
    "import": ("jaxtrain.interop.__main__", "_parse"),
}


@pytest.fixture(autouse=True, scope="module")
def modules_are_imported():
    """Imports all commands first, because packages that they import define flags of their own."""
    platforms = os.environ["JAX_PLATFORMS"]
    for name in NAMES:
        module_of(name)
    os.environ["JAX_PLATFORMS"] = platforms  # jaxtrain.plan sets it


@pytest.fixture(autouse=True)
def started_by_its_short_name(tmp_path, monkeypatch):
    """Makes the program look as if a shell had found `jaxtrain` on its PATH."""
    program = tmp_path / "bin" / "jaxtrain"
    program.parent.mkdir()
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", [str(program)])
    handlers = list(logging.get_absl_logger().handlers), list(logging.logging.root.handlers)
    yield
    logging.get_absl_logger().handlers[:] = handlers[0]  # absl's app.run adds its own
    logging.logging.root.handlers[:] = handlers[1]


def module_of(name):
    module = importlib.import_module(BY_NAME[name].module)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{BY_NAME[name].module}.__main__")
    return module


def help_of(capsys, start, *args) -> str:
    with fresh_flags():
        assert exit_status(start, *args) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def examples(text) -> list[str]:
    """Returns the commands below `Examples:`, with continued lines joined."""
    block = text.partition("\n\n")[0].replace("\\\n", " ").splitlines()
    assert block[0] == "Examples:"
    return [line.strip() for line in block[1:]]


def test_without_arguments_all_commands_are_listed_and_jax_is_not_imported():
    program = (
        "import sys; from jaxtrain.cli import main; main([]); print('jax' in sys.modules, 'absl' in"
        " sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.endswith("False False\n")
    for name in NAMES:
        assert re.search(rf"^  {name} +\w", done.stdout, re.M), name
    assert len(done.stdout.splitlines()) < 45


@pytest.mark.parametrize("name", NAMES)
def test_help_starts_with_three_examples_that_use_the_short_name(name, capsys):
    text = help_of(capsys, cli.main, [name, "--help"])
    shown = examples(text)
    assert len(shown) >= 3
    assert all(re.match(r"jaxtrain \w+", line) for line in shown)
    assert any(line.startswith(f"jaxtrain {name}") for line in shown)
    for word in ("absl", "flags:", "python -m jaxtrain", str(ROOT), sys.prefix, "{prog}"):
        assert word not in text, word
    assert text == help_of(capsys, cli.main, ["help", name])
    assert text == help_of(capsys, cli.main, [name, "-h"])


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_module_uses_the_modules_name(name, capsys):
    command = BY_NAME[name]
    start = getattr(module_of(name), command.function)
    text = help_of(capsys, start, [*command.words, "--help"])
    assert any(line.startswith(command.long_form) for line in examples(text))
    usages = re.findall(r"^usage: (.*?) \[", text, re.M)
    assert all(usage == command.long_form for usage in usages)


@pytest.mark.parametrize("name", NAMES)
def test_every_example_in_the_help_is_a_valid_command_line(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    # Stands for configs that are built from files which the examples only name.
    no_files = lambda *files: to_config_dict(TrainConfig(weights=files[0]))
    for builder in ("build_record_config", "build_config"):
        monkeypatch.setattr(f"jaxtrain.crosscheck.__main__.{builder}", no_files)
    # Stands for runs that the examples only name.
    find = lambda name: Path(name) if name.startswith("runs/") else None
    monkeypatch.setattr("jaxtrain.config.config_files.find_run_folder", find)
    stored = lambda folder: to_config_dict(TrainConfig(workdir=str(folder)))
    monkeypatch.setattr("jaxtrain.config.config_files.load_run_config", stored)
    for line in examples(help_of(capsys, cli.main, [name, "--help"])):
        _, used, *argv = shlex.split(line, comments=True)
        if used in PARSE:
            module, function = PARSE[used]
            words = BY_NAME[used].words
            read = getattr(importlib.import_module(module), function)
            if words:
                read(["jaxtrain", *words, *argv])
            else:
                read(argv, f"jaxtrain {used}")
            continue
        with fresh_flags():
            status = exit_status(cli.main, [used, *argv, "--only_check_args"])
        assert status == 0, (line, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["train", "debug", "--step=4"], "--steps"),
        (["train", "debug", "--learning_rate=4"], "--optim.learning_rate"),
        (["train", "debug", "--config.stepz=4"], "--config.steps"),
        (["encode", "--inptu=a"], "--input"),
        (["evaluate", "--runn=a"], "--run"),
        (["generate", "--run=a", "--temprature=1"], "--temperature"),
        (["export", "--run=a", "--too=b"], "--to"),
        (["import", "--form=a", "--run=b"], "--from"),
        (["summary", "a", "--folow"], "--follow"),
        (["compare", "a", "b", "--margn=1"], "--margin"),
        (["profile", "a", "--topp=1"], "--top"),
        (["plan", "debug", "--gpu=1"], "--gpus"),
        (["bench", "--suit=cpu"], "--suite"),
        (["study", "study_quick", "--study.basline=a"], "--study.baseline"),
        (["launch", "--host=a"], "--hosts"),
        (["slo", "check", "a", "--agains=b"], "--against"),
        (["doctor", "--jsn"], "--json"),
        (["crosscheck", "run", "crosscheck_gpt2", "--precison=float64"], "--precision"),
        (["trian", "debug"], "jaxtrain train"),
    ],
)
def test_a_misspelt_flag_or_command_is_answered_with_the_right_one(argv, meant, capsys):
    with fresh_flags():
        assert exit_status(cli.main, argv) in (1, 2, REFUSED)
    error = capsys.readouterr().err
    assert f"Did you mean {meant}?" in error
    assert len(error.splitlines()) == 1 and error.startswith("error: ")


def test_a_typographic_dash_is_explained(capsys):
    assert exit_status(cli.main, ["doctor", "\u2014json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: \u2014json begins with a typographic dash. Write --json.")


def test_ctrl_c_while_a_command_is_imported_prints_one_line(capsys, monkeypatch):
    class Interrupting:
        def find_spec(self, name, *_):
            if name == "launch.summary":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "launch.summary", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert cli.main(["summary", "runs/a"]) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_flags_cannot_be_abbreviated():
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--js"])


def test_version_names_the_commit_of_a_checkout(capsys):
    assert cli.main(["--version"]) == 0
    version = capsys.readouterr().out
    assert re.fullmatch(r"jaxtrain \S+(, commit [0-9a-f]{12}(\+changes)?)?; jax \S+; .*\n", version)
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert ("commit" in version) == (git.returncode == 0)
    assert git.stdout[:12] in version


def test_commands_in_a_text_are_rewritten_in_the_form_that_the_user_typed():
    text = "run jaxtrain plan, or python -m jaxtrain.interop export --run=a; see jaxtrain trains"
    assert rewrite_commands(text, "python -m jaxtrain.train") == (
        "run python -m jaxtrain.plan, or python -m jaxtrain.interop export --run=a; "
        "see jaxtrain trains"
    )
    assert rewrite_commands(text, "bin/jaxtrain train").startswith(
        "run bin/jaxtrain plan, or bin/jaxtrain export --run=a;"
    )


def test_the_two_copies_of_arguments_py_are_equal():
    ours, theirs = (ROOT / name / "arguments.py" for name in ("pallas_kernels", "launch"))
    assert ours.read_text() == theirs.read_text()
