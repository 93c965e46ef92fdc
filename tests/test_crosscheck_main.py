"""Whole runs of both sides: bfloat16, a user's own loop, llm.c's debug states, the sides."""

import dataclasses

import jax
import numpy as np
import pytest
from flag_scenes import exit_status, fresh_flags

from jaxtrain.config.train_config import freeze, to_config_dict
from jaxtrain.errors import REFUSED
from jaxtrain.interop.hf import write_folder
from jaxtrain.model.trees import named_leaves

torch = pytest.importorskip(
    "torch", reason='torch is missing: pip install "jaxtrain[crosscheck]" to test the PyTorch side'
)
transformers = pytest.importorskip("transformers", reason="transformers is missing: crosscheck")
from torch.nn import functional as F  # noqa: E402

from jaxtrain.crosscheck import jax_train, llmc_state, sides  # noqa: E402
from jaxtrain.crosscheck.__main__ import command  # noqa: E402
from jaxtrain.crosscheck.comparison import compare_bfloat16, compare_traces  # noqa: E402
from jaxtrain.crosscheck.explanation import bfloat16_table, explain  # noqa: E402
from jaxtrain.crosscheck.recorder import Recorder  # noqa: E402
from jaxtrain.crosscheck.trace import batches_of, read_trace  # noqa: E402
from jaxtrain.interop.llmc import HEADER, file_layout  # noqa: E402
from tests.crosscheck_sides import (  # noqa: E402, F401
    draw_start,
    median_share_of_formula,
    one_layer,
    one_thread_and_old_x64_setting,
    record_torch,
    small_config,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i}: {i * i} is the square of {i}.\n" for i in range(2_000)))
    return path


def bfloat16_errors(start, seed, folder):
    """Returns both sides' errors for a GPT-2, whose bias gradients are sums over all tokens."""
    cfg = dataclasses.replace(start.run.cfg, seed=seed)  # reads other batches
    rng = np.random.default_rng(seed)
    weights = jax.tree.map(lambda w: rng.permuted(w.ravel()).reshape(w.shape), start.weights)
    put = lambda old, new: jax.device_put(new, old.sharding)
    state = start.state._replace(params=jax.tree.map(put, start.state.params, weights))
    start = start._replace(run=start.run._replace(cfg=cfg), state=state, weights=weights)
    jax_train.record(start, cfg.steps, folder / "ours.jsonl")
    wide = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype="float32"))
    theirs, truth = record_torch(start, folder / "t.jsonl"), record_torch(start, folder / "w", wide)
    return compare_bfloat16(truth, read_trace(folder / "ours.jsonl"), theirs)


@pytest.mark.long
def test_bfloat16_costs_us_at_most_a_tenth_more_than_pytorch(tmp_path, text, monkeypatch):
    """Compares the passes over three seeds, and not the updates: Adam turns a gradient near zero
    into its sign, so that its errors are chance (0.3 to 4 times PyTorch's in one seed).
    """
    cfg = small_config("gpt2", tmp_path, text, "bfloat16", 6, name="adamw")
    start = draw_start(cfg, read_data=True)
    step = jax_train.build_traced_step(start.run)  # the same for all seeds: compiled once
    monkeypatch.setattr(jax_train, "build_traced_step", lambda run: step)
    found = [bfloat16_errors(start, seed, tmp_path) for seed in range(3)]
    mean = lambda quantity: np.exp(np.log([errors[quantity] for errors in found]).mean(0))
    shown, passed = bfloat16_table({name: mean(name) for name in ("activations", "gradient")})
    assert passed, shown
    assert all(1e-4 < e < 0.5 for errors in found for pair in errors.values() for e in pair)


def test_an_error_20_percent_above_pytorchs_fails_the_bfloat16_comparison():
    shown, passed = bfloat16_table({"gradient": (1.2e-2, 1.0e-2)})
    assert not passed and "at most 1.1" in shown


def build_hf_gpt2(start, folder):
    """Returns transformers' GPT-2 with the weights of a start."""
    axes = start.run.model.axes
    write_folder(folder, start.run.cfg.model, named_leaves(axes), named_leaves(start.weights))
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


def test_a_users_loop_on_transformers_gpt2_is_followed_to_its_first_fault(tmp_path, text):
    options = {"name": "adamw", "schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0}
    options["weight_decay"] = 0.0
    cfg = small_config("gpt2", tmp_path, text, "float32", 3, adam_eps=1e-6, **options)
    start = draw_start(one_layer(cfg))
    model = build_hf_gpt2(start, tmp_path / "hf")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0
    )
    blocks = {f"blocks.{i}": block for i, block in enumerate(model.transformer.h)}
    seen = blocks | {"embed": model.transformer.drop, "logits": model.lm_head}
    generator = torch.Generator().manual_seed(0)
    with Recorder(tmp_path / "theirs.jsonl", model, {"c_attn": 3}, seen) as recorder:
        for step in range(3):
            tokens = torch.randint(0, 256, (4, 25), generator=generator)
            x, y = tokens[:, :-1], tokens[:, 1:]
            loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
            loss.backward()
            recorder.before_step(x, y, loss)
            if step == 2:
                optimizer.param_groups[0]["lr"] = 3e-4  # the fault
            optimizer.step()
            recorder.after_step()
            optimizer.zero_grad()
    theirs = read_trace(tmp_path / "theirs.jsonl")
    jax_train.record(start, 3, tmp_path / "ours.jsonl", "hf", batches_of(theirs))
    found = compare_traces(read_trace(tmp_path / "ours.jsonl"), theirs)
    assert found.missing == []
    assert (found.divergence.stage, found.divergence.first.step) == ("optimizer", 3), explain(found)
    assert any(name.endswith("c_attn.bias/1") for name in found.rounding_only)


def write_state(path, model, x, y):
    """Writes a debug state like llm.c's train_gpt2.py, from transformers' GPT-2."""
    out = model(x).logits
    loss = F.cross_entropy(out.flatten(0, 1), y.flatten())
    loss.backward()
    sizes, grads = model.config, {n: p.grad.numpy() for n, p in model.named_parameters()}
    padded = -(-sizes.vocab_size // 128) * 128
    head = np.zeros(HEADER, "<i4")
    head[:4] = 20240327, 2, *x.shape
    with open(path, "wb") as file:
        for array in (head, x.int().numpy(), y.int().numpy()):
            file.write(array.tobytes())
        file.write(out.detach().numpy().tobytes() + np.float32(loss.item()).tobytes())
        T, L, C = sizes.n_positions, sizes.n_layer, sizes.n_embd
        for name, shape, turned in file_layout(T, L, C, padded):
            g = grads[name].T if turned else grads[name]
            rows = [(0, shape[0] - g.shape[0])] + [(0, 0)] * (g.ndim - 1)
            file.write(np.pad(g, rows).astype("<f4").tobytes())


def test_gradients_are_compared_with_an_llmc_debug_state(tmp_path, text, capsys):
    cfg = small_config("gpt2", tmp_path, text, "float32", name="adamw")
    config = to_config_dict(cfg)
    config.model.update(L=1, F=4 * cfg.model.D, V=200)
    start = draw_start(freeze(config))
    axes = named_leaves(start.run.model.axes)
    model = build_hf_gpt2(start, tmp_path / "hf")
    write_folder(tmp_path / "w.bin", start.run.cfg.model, axes, named_leaves(start.weights))
    tokens = torch.randint(0, 200, (2, 17), generator=torch.Generator().manual_seed(1))
    state = tmp_path / "state.bin"
    write_state(state, model, tokens[:, :-1], tokens[:, 1:])
    assert sides.compare_llmc(tmp_path / "w.bin", state, tmp_path / "out") == 0
    assert "AGREE: jaxtrain and llm.c are within the tolerances" in capsys.readouterr().out

    raw = bytearray(state.read_bytes())
    gradients = np.frombuffer(raw, "<f4")
    gradients[-1] += 0.01  # the last bias of the last norm
    state.write_bytes(raw)
    llmc_state.write_trace(state, start.run.cfg.model, tmp_path / "changed.jsonl")
    traces = tmp_path / "out/jaxtrain.jsonl", tmp_path / "changed.jsonl"
    found = compare_traces(*map(read_trace, traces))
    assert sides.report(found, tmp_path / "changed.png") == 1
    shown = capsys.readouterr().out
    assert "DIFFER at step 1, stage gradient" in shown
    assert "look first at: gradient of transformer.ln_f.bias" in shown

    state.write_bytes(raw[:-4])
    with pytest.raises(ValueError, match="must have .* bytes"):
        sides.compare_llmc(tmp_path / "w.bin", state, tmp_path / "out")


def test_the_command_compares_a_config_in_float64_and_plots_the_losses(tmp_path, text, capsys):
    flags = ["--config=configs/crosscheck_llama.py", f"--config.workdir={tmp_path}"]
    flags += [f"--config.data.text={text}", "--config.model.D=32", "--config.model.F=48"]
    flags += ["--config.optim.name=adamw", "--config.compile_cache=", "--config.model.L=1"]
    with fresh_flags():
        assert exit_status(command, ["run", *flags, "--steps=2", "--precision=float64"]) == 0
    agree = "AGREE: jaxtrain and pytorch are within the tolerances of float64 at all 2 steps"
    assert agree in capsys.readouterr().out
    assert (tmp_path / "compare_float64.png").stat().st_size > 10_000
    traces = [tmp_path / f"{side}_float64.jsonl" for side in ("jaxtrain", "pytorch")]
    found = compare_traces(*map(read_trace, traces))
    assert found.measured and median_share_of_formula(found) < 1  # stricter than the formula
    lines = traces[1].read_text().splitlines()
    spoiled = tmp_path / "spoiled.jsonl"
    spoiled.write_text("\n".join([*lines[:2], lines[2].replace('"inputs": "', '"inputs": "x'), ""]))
    comparison = compare_traces(read_trace(traces[0]), read_trace(spoiled))
    assert sides.report(comparison, tmp_path / "spoiled.png") == 1
    assert "DIFFER at step 1, stage batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "values, error",
    [
        ({"name": "normuon"}, "optim.name=normuon .must be adamw or muon"),
        ({"name": "muon", "ns_coefficients": "aol4"}, "optim.ns_coefficients=aol4"),
        ({"data": {"pack": True}}, "--keep_batches"),
    ],
)
def test_a_config_that_the_pytorch_side_cannot_train_is_refused(values, error, tmp_path, text):
    with pytest.raises(ValueError, match=error):
        sides.check_torch_side(small_config("llama", tmp_path, text, **values))


def test_a_missing_trace_is_one_line_of_error(capsys):
    with fresh_flags():
        absent = ["/absent/a.jsonl", "/absent/b.jsonl"]
        assert exit_status(command, ["compare", *absent]) == REFUSED
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert "a trace must be a readable text file" in printed.err
