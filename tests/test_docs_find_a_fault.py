"""docs/find_a_fault.md: its loop, commands and reports are what a reader gets."""

import contextlib
import io
import re
import runpy
import subprocess
from pathlib import Path

import pytest

REASON = 'torch is missing: pip install "jaxtrain[crosscheck]" to test the tutorial'
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("transformers", reason="transformers is missing: crosscheck")

import runs  # noqa: E402
from jaxtrain.crosscheck.comparison import compare_traces  # noqa: E402
from jaxtrain.crosscheck.explanation import explain, steps_table  # noqa: E402
from jaxtrain.crosscheck.trace import read_trace  # noqa: E402

ROOT = Path(__file__).parent.parent
LOOP = ROOT / "docs/find_a_fault.py"
PAGE = (ROOT / "docs/find_a_fault.md").read_text()


def blocks(language=""):
    """Returns the page's code blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.S | re.M)
    return [text for name, text in found if name == language]


def shape(text):
    """Returns a text without its numbers and the width of its columns."""
    return re.sub(r"\s+", " ", re.sub(r"-?\d[\d.e+-]*", "#", text)).strip()


def run_loop(path):
    """Runs a loop in the current folder; returns what it prints."""
    shown, threads = io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)  # faster for small matrices
    with contextlib.redirect_stdout(shown):
        runpy.run_path(str(path))
    torch.set_num_threads(threads)
    return shown.getvalue()


def run_command(text):
    """Runs a command in the current folder; returns its exit status and what it prints."""
    program, *arguments = text.replace("\\\n", " ").split()
    assert program == "jaxtrain"
    done = runs.fork_cli(*arguments, cwd=Path.cwd())
    out, err = done.communicate()
    return subprocess.CompletedProcess(arguments, done.returncode, out, err)


def test_the_page_shows_the_loop():
    assert LOOP.read_text() in blocks("python")


@pytest.mark.long
def test_a_reader_finds_the_fault_and_the_fixed_loop_agrees(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses, record, compare, differs, again, agrees = blocks()
    assert again == f"python docs/find_a_fault.py\n{compare}"
    assert shape(run_loop(LOOP)) == shape(losses)

    done = run_command(record)
    assert done.returncode == 0, done.stderr
    done = run_command(compare)
    assert done.returncode == 1, done.stderr
    assert shape(done.stdout) == shape(differs)

    (diff,) = blocks("diff")
    wrong, right = (re.search(rf"^\{sign}(.*\n)", diff, re.M)[1] for sign in "-+")
    source = LOOP.read_text()
    assert source.count(wrong) == 1
    fixed = tmp_path / "fixed.py"
    fixed.write_text(source.replace(wrong, right))
    run_loop(fixed)
    comparison = compare_traces(read_trace("ours.jsonl"), read_trace("theirs.jsonl"))
    assert comparison.divergence is None, explain(comparison)
    lines = [shape(line) for line in agrees.splitlines()]
    # The other lines depend on how the processor rounds.
    assert lines[0] == shape(steps_table(comparison).splitlines()[0])
    (verdict,) = [line for line in explain(comparison).splitlines() if line.startswith("AGREE")]
    assert shape(verdict) in lines
