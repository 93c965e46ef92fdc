"""The documentation is current: generated parts, notebooks, links and commands."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xla_flags

import runs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def test_generated_pages_and_notebooks_are_current():
    program = "import runpy\nrunpy.run_path('docs/generate.py', run_name='__main__')"
    runs.finish(runs.fork_program(program, "--check"))


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt_on_one_screen", "compare_optimizers", "use_optimizers"])
def test_a_notebook_runs_from_its_first_cell_to_its_last(name):
    cells = json.loads((DOCS / f"{name}.ipynb").read_text())["cells"]
    scope = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)


@pytest.mark.long
def test_the_call_of_a_kernel_that_a_page_shows_equals_the_reference():
    section = (
        (DOCS / "kernels.md").read_text().partition("## Call a kernel from your own model\n")[2]
    )
    code = "\n".join(re.findall(r"^ {4}(.*)", section.partition("\n- ")[0], re.M))
    scope: dict[str, Any] = {}
    exec(code, scope)
    from pallas_kernels.flash_attention import flash_attention_reference

    reference = lambda q: flash_attention_reference(q, scope["k_BSGK"], scope["v_BSGK"], window=96)
    o, pullback = jax.vjp(reference, scope["q_BTHK"])
    [dq] = pullback(jnp.ones_like(o))
    assert jnp.allclose(scope["o_BTHK"], o, atol=1e-5)
    assert jnp.allclose(scope["dq_BTHK"], dq, atol=1e-5)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_exist(page):
    text = re.sub(r"```diff.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)#]+)", text)
    missing = [
        link
        for link in links
        if "://" not in link and not (page.parent / link).exists() and not (ROOT / link).exists()
    ]
    assert not missing
    folders = "jaxtrain|launch|pallas_kernels|configs|tests|docs"
    paths = re.findall(rf"\b((?:{folders})/[\w./]+\.\w+)", text)
    placeholders = ("CHIP.json", "OP.py")
    assert not [p for p in paths if not (ROOT / p).exists() and not p.endswith(placeholders)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_a_page_shows_exist(page):
    """Compares `jaxtrain train ... --a.b=c` in code with the fields of the config."""
    from jaxtrain.config.fields import list_sections, plain_fields
    from jaxtrain.config.train_config import TrainConfig

    known = {
        f"{prefix}{field.name}"
        for prefix, section in list_sections(TrainConfig)
        for field in plain_fields(section)
    }
    sections = "|".join(sorted({name.partition(".")[0] for name in known if "." in name}))
    shown = set(re.findall(rf"--((?:{sections})\.\w+)", page.read_text()))
    assert shown <= known


def test_the_programs_of_the_library_page_run_and_continue(tmp_path, monkeypatch, capsys):
    """Runs the page's blocks twice in one folder: the second time there is nothing left to do."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "library.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text((ROOT / "README.md").read_text())
    printed = []
    for _ in range(2):
        exec("\n".join(blocks[:2]), {})
        for block in blocks[2:]:  # each is a program of its own
            exec(block, scope := {})
        printed.append(capsys.readouterr().out.splitlines())
    assert [line.split()[0] for line in printed[0][1:3]] == ["10", "20"]
    assert float(printed[0][2].split()[1]) < float(printed[0][1].split()[1]) < np.log(256)
    assert printed[1] == [printed[0][0], *printed[0][3:]]  # no losses
    assert printed[0][3] == "trained 20 steps"
    assert float(printed[0][4]) == pytest.approx(0.363, abs=0.001)
    np.testing.assert_allclose(scope["reference"], -(0.6 * 0.7 + 0.7) * 2, rtol=0.02)


@pytest.mark.long
def test_the_examples_of_extensions_train(tmp_path):
    """Applies the patches of docs/extend.md to a copy of the tree, and runs its script."""
    blocks = re.findall(r"```(diff|python)\n(.*?)```", (DOCS / "extend.md").read_text(), re.S)
    for folder in ("jaxtrain", "pallas_kernels", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for kind, text in blocks:
        if kind == "diff":
            run = ["git", "apply", "-"]
        else:
            run = [sys.executable, "-"]
        subprocess.run(run, cwd=tmp_path, input=text, text=True, check=True, capture_output=True)
    train = "-m jaxtrain.train debug --steps=3 --optim.name=lion --model.mlp=silu"
    shards = "--data.shards=my_shards --data.eot=0 --workdir=run --optim.learning_rate=0.001"
    small = "--model.L=1 --sample.tokens=0"  # compiles sooner
    result = subprocess.run(
        [sys.executable, *f"{train} {shards} {small}".split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "XLA_FLAGS": xla_flags.flags(devices=1)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["optim"]["name"], config["model"]["mlp"]) == ("lion", "silu")
