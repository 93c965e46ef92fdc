"""`crosscheck optimizer`: somebody's PyTorch optimizer against ours."""

import dataclasses
import sys
import textwrap

import jax
import pytest

from jaxtrain.config.sections import DECAY_GROUPS, OptimConfig

torch = pytest.importorskip(
    "torch", reason='torch is missing: pip install "jaxtrain[crosscheck]" to test the PyTorch side'
)
from jaxtrain.crosscheck import tensor_check  # noqa: E402
from jaxtrain.crosscheck.explanation import explain  # noqa: E402
from jaxtrain.crosscheck.optimizer_check import build_config, check_optimizer  # noqa: E402
from jaxtrain.crosscheck.tensor_check import compare_on_tensors  # noqa: E402
from jaxtrain.crosscheck.their_optimizer import (  # noqa: E402
    build_default_config,
    load_optimizer,
    settings_table,
)
from tests.crosscheck_sides import one_thread_and_old_x64_setting  # noqa: E402, F401

# AdamW as somebody may write it. Braces mark the places of the faults below.
ADAMW = """
import torch

class Mine(torch.optim.Optimizer):
    def __init__(self, params, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), rate = group["betas"], group["lr"]
            for p in group["params"]:
                s, g = self.state[p], p.grad
                if not s:
                    s.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                s["t"] += {count}
                s["m"].lerp_(g, 1 - b1)
                s["v"].lerp_({square}, 1 - b2)
                m, v = s["m"] / {first}, s["v"] / (1 - b2 ** s["t"])
                p.mul_(1 - rate * group["weight_decay"])
                p.sub_(rate * m / {root})
"""
CORRECT = {
    "count": "1",
    "square": "g * g",
    "first": "(1 - b1 ** s['t'])",
    "root": "(v.sqrt() + group['eps'])",
}
FAULTS = {  # part -> (what it is replaced by, the first step and a tensor that differ, the cause)
    "count": ("int(bool(g.any()) or s['t'] > 0)", 1, "late", "NaN or infinity"),
    "square": ("(g * g).float().double()", 1, "", "computes in float32"),
    "first": ("(1.0 if s['t'] > 2 else 1 - b1 ** s['t'])", 3, "", "learning rates"),
    "root": ("(v + group['eps']).sqrt()", 1, "small_gradient", "added to the root or inside"),
}


def write_optimizer(folder, **parts):
    path = folder / "mine.py"
    text = textwrap.dedent(ADAMW)
    for name, part in (CORRECT | parts).items():
        text = text.replace("{" + name + "}", part)
    path.write_text(text)
    return f"{path}:Mine"


def compare(source, ours="adamw", steps=8, precision="float64", arguments="", **options):
    jax.config.update("jax_enable_x64", precision == "float64")
    theirs = load_optimizer(source, arguments)
    optim = build_default_config(theirs, ours).optim
    cfg = OptimConfig(**(dict(optim) | options | {"ns_dtype": precision}))
    plain = dataclasses.replace(
        cfg,
        schedule="constant",
        warmup_steps=0,
        clip_norm=0.0,
        decay_groups=",".join(DECAY_GROUPS),
    )
    return compare_on_tensors(plain, theirs, steps, precision)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_correct_adamw_agrees_on_random_tensors(tmp_path, precision):
    found = compare(write_optimizer(tmp_path), precision=precision)
    assert found.divergence is None, explain(found)


@pytest.mark.parametrize("part", FAULTS)
def test_a_fault_of_an_adamw_is_found_at_its_first_step(tmp_path, part):
    code, step, tensor, cause = FAULTS[part]
    found = compare(write_optimizer(tmp_path, **{part: code}))
    assert found.divergence is not None and found.divergence.stage == "optimizer"
    assert found.divergence.first.step == step
    assert tensor in found.divergence.first.tensor
    assert cause in " ".join(found.causes)


MUON = (
    "lr=0.02, dtype=torch.float64, momentum=0.9, nesterov=True, weight_decay=0.1, ns_steps=5, "
    "adjust_lr_fn='match_rms_adamw'"
)
SOURCE = "jaxtrain.crosscheck.torch_muon:Muon"


def test_a_correct_muon_agrees_on_random_tensors():
    found = compare(SOURCE, "muon", arguments=MUON)
    assert found.divergence is None, explain(found)


@pytest.mark.parametrize(
    ("options", "step", "words"),
    [
        ({"momentum": 0.95}, 2, "momentum, Nesterov, betas"),
        ({"scale": "spectral"}, 1, "factor for the shape"),
        ({"weight_decay": 0.0}, 1, "decays"),
    ],
)
def test_a_setting_of_muon_that_differs_is_named(options, step, words, monkeypatch):
    matrices = {name: tensor_check.MATRICES[name] for name in ("wide", "tall")}  # compiles sooner
    monkeypatch.setattr(tensor_check, "MATRICES", matrices)
    found = compare(SOURCE, "muon", arguments=MUON, **options)
    assert found.divergence is not None and found.divergence.first.step == step
    assert words in " ".join(found.causes)


def test_settings_are_taken_from_theirs_and_differences_are_marked(tmp_path):
    theirs = load_optimizer(write_optimizer(tmp_path), "betas=(0.8, 0.99), weight_decay=0")
    cfg = OptimConfig(**build_default_config(theirs, "adamw").optim)
    assert (cfg.adam_b1, cfg.adam_b2, cfg.adam_learning_rate) == (0.8, 0.99, 0.01)
    assert cfg.weight_decay == 0
    assert "differs" not in settings_table(theirs, cfg)
    changed = settings_table(theirs, dataclasses.replace(cfg, adam_b2=0.95))
    assert "optim.adam_b2=0.95  <- differs" in changed


@pytest.mark.long
def test_the_whole_command_trains_a_gpt_with_both(tmp_path, capsys):
    source = write_optimizer(tmp_path)
    config = build_config(source, "", "adamw")
    config.workdir = str(tmp_path / "run")
    config.model.update(L=1, D=16, H=2, G=2, K=8, F=16)
    config.data.update(batch=2, seq_len=16)
    assert check_optimizer(config, source, "", 3, "float64") == 0
    printed = capsys.readouterr().out
    assert printed.count("AGREE") == 2 and "GPT of" in printed


def test_a_gpt_is_not_trained_with_an_optimizer_that_differs(tmp_path, capsys):
    source = write_optimizer(tmp_path, root="v.sqrt()")
    config = build_config(source, "", "adamw")
    config.workdir = str(tmp_path / "run")
    assert check_optimizer(config, source, "", 3, "float64") == 1
    assert "GPT is not trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "arguments", "words"),
    [
        ("mine", "", "FILE.py:Class"),
        ("missing.py:Muon", "", "existing file"),
        ("no_such_package:Muon", "", "importable"),
        ("torch.optim:lr_scheduler", "", "class with a method `step`"),
        ("torch.optim:AdamW", "lr", "keyword arguments"),
        ("torch.optim:AdamW", "lr=open('x')", "keyword arguments"),
        ("torch.optim:AdamW", "**x", "keyword arguments"),
        ("torch.optim:AdamW", "rate=1", "must be built by AdamW"),
        ("torch.optim.lr_scheduler:StepLR", "step_size=1", "must be built by StepLR"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused(source, arguments, words):
    with pytest.raises(ValueError, match=words):
        build_config(source, arguments, "adamw")


def test_an_optimizer_that_cannot_step_float64_is_refused(tmp_path):
    source = write_optimizer(tmp_path, square="(g * g).float()")
    text = r"must step parameters of torch.float64; step 1 .*mine.py, line 18.*--precision=float32"
    with pytest.raises(ValueError, match=text):
        compare(source)


def test_a_step_that_fails_or_replaces_its_tensors_is_refused(tmp_path):
    for root, words in {
        "(1 / (s['t'] < 3))": r"step 3 raises ZeroDivisionError: division by zero \(.*mine.py",
        "exit(3)": "step 1 raises SystemExit: 3",
        "1); p.data = (p.data.half()": "after step 1 one is of .* torch.float16",
        "1); p.data = (p.data.flatten()": r"after step 1 one is of \(1024,\)",
    }.items():
        tensor = torch.nn.Parameter(torch.ones(32, 32, dtype=torch.float64))
        theirs = load_optimizer(write_optimizer(tmp_path, root=root), "")
        optimizer = theirs.build([{"params": [tensor]}])
        with pytest.raises(ValueError, match=words):
            for _ in range(3):
                tensor.grad = torch.ones_like(tensor)
                optimizer.step()


def test_a_file_is_imported_once_under_a_name_that_no_other_module_has(tmp_path, capsys):
    path = tmp_path / "random.py"
    path.write_text("import torch\nprint('imported')\nclass Mine(torch.optim.SGD): pass\n")
    config = build_config(f"{path}:Mine", "lr=0.1", "muon")
    assert config.optim.learning_rate == 0.1
    assert load_optimizer(f"{path}:Mine", "").cls is load_optimizer(f"{path}:Mine", "").cls
    assert capsys.readouterr().out.count("imported") == 1
    assert sys.modules["random"].__file__ != str(path)
    path.write_text("raise SystemExit('no guard')")
    with pytest.raises(ValueError, match="must be importable; .* raises SystemExit: no guard"):
        load_optimizer(f"{path}:Mine", "")


def test_groups_that_are_no_list_of_dicts_are_refused(tmp_path):
    path = tmp_path / "groups.py"
    path.write_text("class Mine:\n    def __init__(self, params): self.param_groups = {'lr': 1}\n")
    path.write_text(path.read_text() + "    def step(self): pass\n")
    with pytest.raises(ValueError, match="must have param_groups, a list of dicts .* got {'lr'"):
        build_config(f"{path}:Mine", "", "muon")


def test_both_names_must_be_given():
    with pytest.raises(ValueError, match="--theirs=FILE.py:Class and --ours=NAME"):
        build_config("torch.optim:AdamW", "", "")
    with pytest.raises(ValueError, match="ours must be one of muon, .* got 'lion'. Set --ours"):
        build_config("torch.optim:AdamW", "", "lion")
