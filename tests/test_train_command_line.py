"""What the train and evaluate commands print and refuse on unusual input and terminals."""

import jax
import pytest

import runs
from jaxtrain.errors import REFUSED
from jaxtrain.train import train


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.optim.learning_rate=fast", "must be a number; got 'fast'"),
        ("--config.data.text=nowhere", "nowhere"),
    ],
)
def test_a_bad_flag_ends_the_command_with_one_line_and_status_78(tmp_path, text, flag, message):
    out = runs.finish(runs.fork(tmp_path / "run", text, flag), REFUSED)
    assert message in out
    assert "Traceback" not in out


@pytest.mark.long
def test_a_run_on_an_ascii_terminal_without_a_home_prints_escapes(tmp_path, monkeypatch):
    """The folder's name has a space and a non-ASCII letter; text and prompt have some too."""
    (tmp_path / "text.txt").write_text("naïve → über ☃\n" * 1_000)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.delenv("HOME")
    flags = ("--config.steps=2", "--config.log_every=1", "--config.sample.prompt=é 你")
    flags += ("--config.optim.name=adamw", "--config.model.L=1")  # to compile faster
    out = runs.finish(runs.start(tmp_path / "a ü", tmp_path / "text.txt", *flags))
    assert f"run       {tmp_path}/a \\xfc\n" in out
    assert "\n\\xe9 \\u4f60|" in out
    assert "warning: only" in out  # 2 steps are evaluated on few tokens
    assert "\x1b" not in out and "\r" not in out and "Traceback" not in out


def test_a_non_ascii_run_directory_in_an_ascii_locale_is_refused_before_anything_is_written(
    tmp_path, text, monkeypatch
):
    for name, value in runs.ASCII.items():
        monkeypatch.setenv(name, value)
    [line] = runs.finish(runs.start(tmp_path / "ü", text), REFUSED).splitlines()
    assert line.startswith("error: the path of a run must be ASCII or UTF-8; got ")
    assert "Set the environment variable PYTHONUTF8=1" in line
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_is_not_utf8_is_refused_before_the_first_step(tmp_path, text):
    with pytest.raises(ValueError, match="Set --sample.prompt"):
        train(
            runs.debug_config(tmp_path, text, sample__prompt="\udcff"),
            jax.devices()[:1],
            quiet=True,
        )


def test_evaluate_refuses_a_folder_without_a_run(tmp_path):
    out = runs.finish(runs.fork_command("evaluate", f"--run={tmp_path}"), REFUSED)
    assert "--run must be a run's folder" in out and "Traceback" not in out
