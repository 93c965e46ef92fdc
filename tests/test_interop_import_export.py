"""Exports of a whole run, imports of them, and training from their weights."""

import contextlib
import dataclasses
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import runs
from configs import debug
from jaxtrain.config import train_config as config_lib
from jaxtrain.errors import REFUSED
from jaxtrain.interop import InteropError
from jaxtrain.interop.__main__ import _parse, main
from jaxtrain.interop.import_export import export_weights, import_weights
from jaxtrain.interop.initial_state import check_model
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.train import train
from jaxtrain.training.resume import check_resumed
from jaxtrain.training.run import restore_run


def config(workdir, text, **values):
    config = debug.get_config()
    config.update(workdir=str(workdir), compile_cache="", steps=3, **values)
    # Muon orthogonalises matrices of one shape, in one iteration.
    config.model.update(H=2, G=2, K=16, F=32, qk_norm=False)
    config.data.text = str(text)
    config.sample.tokens = 0
    # This optimizer evaluates other weights than the parameters.
    config.optim.update(name="accelerated_lmo", strength=0.5, ns_steps=1)
    return config_lib.freeze(config)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, text):
    """Returns (run directory, its Hugging Face export)."""
    root = tmp_path_factory.mktemp("runs")
    assert train(config(root / "run", text), jax.devices()[:1], quiet=True) == 0
    export_weights(root / "run", root / "hf")
    return root / "run", root / "hf"


def test_an_export_has_the_weights_that_evaluation_uses(exported):
    _, state = restore_run(exported[0])
    want = eval_params(state.opt_state, state.params)
    stored = load_file(exported[1] / "model.safetensors")
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"], want["embed"])
    q_DO = np.asarray(want["blocks"]["attention"]["q"]["w"][1]).reshape(32, 32)
    np.testing.assert_array_equal(stored["model.layers.1.self_attn.q_proj.weight"], q_DO.T)
    assert not np.array_equal(want["embed"], state.params["embed"]) or not np.array_equal(
        q_DO, np.asarray(state.params["blocks"]["attention"]["q"]["w"][1]).reshape(32, 32)
    )


def test_an_import_is_step_0_and_exports_the_same_weights(exported, text, tmp_path):
    import_weights(exported[1], tmp_path / "back", text=str(text), tokenizer="bytes")
    export_weights(tmp_path / "back", tmp_path / "again")
    first, second = (load_file(f / "model.safetensors") for f in (exported[1], tmp_path / "again"))
    assert first.keys() == second.keys()
    for name, x in first.items():
        np.testing.assert_array_equal(second[name], x)
    run, state = restore_run(tmp_path / "back")
    assert int(state.step) == 0 and run.mesh.size == 8


def test_a_run_is_restored_on_fewer_devices_if_they_do_not_divide_its_batch(exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / "run")
    stored = json.loads((tmp_path / "run/config.json").read_text())
    stored["config"]["data"]["batch"] = 6
    (tmp_path / "run/config.json").write_text(json.dumps(stored))
    assert restore_run(tmp_path / "run")[0].mesh.size == 6


def test_a_run_starts_from_weights_and_resumes_from_its_own_checkpoint(exported, text, tmp_path):
    weights, on = str(exported[1]), tmp_path / "on"
    train(config(on, text, weights=weights), jax.devices()[:1], quiet=True)
    assert runs.losses(on)[0][1] < runs.losses(exported[0])[0][1] - 0.1
    longer = dataclasses.replace(config(on, text, weights=weights), steps=4)
    train(longer, jax.devices()[:1], quiet=True)
    assert [step for step, _ in runs.losses(on)] == [1, 2, 3, 4]


def test_weights_of_another_model_are_refused_with_the_flags_to_set(exported, text, tmp_path):
    cfg = config(tmp_path / "run", text, weights=str(exported[1]))
    other = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, F=96, rope_theta=5e5))
    with pytest.raises(InteropError, match="model.F=96, not 32; model.rope_theta=5.*--model.F"):
        train(other, jax.devices()[:1], quiet=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("mlp", "relu2"), ("rope_theta", 5e5), ("norm_eps", 1e-5), ("logit_softcap", 30.0)),
        *(("norm_place", "post"), ("norm_gain", False), ("qk_norm", True), ("embed_scale", 2.0)),
        *(("embed_norm", True), ("attention_scale", 0.5), ("attention_softcap", 50.0)),
        *(("window", 8), ("nope_every", 4), ("attention_bias", "qkv"), ("rope_fraction", 0.5)),
        *(("head_bias", True),),
    ],
)
def test_a_checkpoint_is_not_resumed_with_a_config_that_changes_the_function(
    field, value, tmp_path
):
    cfg = config(tmp_path, "unused").model
    stored = config_lib.flatten(config(tmp_path, "unused"))
    other = dataclasses.replace(cfg, attention="reference", remat="full", positions=7)
    check_resumed(other, stored)
    changed = dataclasses.replace(cfg, **{field: value})
    del stored[f"model.{field}"]  # by a version without the field
    for theirs in (config_lib.flatten(config(tmp_path, "unused")), stored):
        with pytest.raises(ValueError, match=f"run began with; got model.{field}=.*workdir"):
            check_resumed(changed, theirs)


def test_a_config_value_rounded_to_float32_counts_as_equal(exported, text, tmp_path):
    copy = tmp_path / "hf"
    shutil.copytree(exported[1], copy)
    fields = json.loads((copy / "config.json").read_text())
    fields["rms_norm_eps"] = float(np.float32(fields["rms_norm_eps"]))
    (copy / "config.json").write_text(json.dumps(fields))
    cfg = config(tmp_path / "run", text)
    assert cfg.model.norm_eps != fields["rms_norm_eps"]
    check_model(cfg.model, copy)


def test_an_import_into_a_folder_with_files_is_refused(exported, text):
    with pytest.raises(InteropError, match="must go to a new folder.*--run"):
        import_weights(exported[1], exported[0], text=str(text), tokenizer="bytes")


def test_an_import_with_text_but_no_tokenizer_is_refused_and_leaves_no_file(exported, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(exported[1], bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(InteropError, match="needs the model's tokenizer.*--tokenizer"):
        import_weights(bare, tmp_path / "run")
    assert list(tmp_path.iterdir()) == [bare]


def test_a_failed_import_leaves_no_file(exported, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError):
        import_weights(exported[1], tmp_path / "run", text=str(tmp_path / "empty.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_an_import_with_shards_takes_the_start_token_from_the_folder(exported, tmp_path):
    copy, shards = tmp_path / "hf", tmp_path / "shards"
    copy.mkdir()
    shards.mkdir()
    shutil.copy(exported[1] / "model.safetensors", copy)
    fields = json.loads((exported[1] / "config.json").read_text()) | {"vocab_size": 256}
    (copy / "config.json").write_text(json.dumps(fields | {"bos_token_id": 7, "eos_token_id": 9}))
    for name in ("train", "val"):
        np.arange(20_000, dtype="<u2").__mod__(256).tofile(shards / f"{name}.bin")
    import_weights(copy, tmp_path / "run", shards=str(shards))
    assert restore_run(tmp_path / "run")[0].cfg.data.eot == 7


def test_a_tokenizer_whose_start_token_the_folder_does_not_name_is_reported(
    exported, text, tmp_path, capsys
):
    copy = tmp_path / "hf"
    shutil.copytree(exported[1], copy)
    fields = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(fields | {"bos_token_id": 7, "eos_token_id": 9}))
    (copy / "generation_config.json").unlink()
    import_weights(copy, tmp_path / "run", text=str(text))
    out = capsys.readouterr().out
    assert "documents start with token 0 of" in out and "bos_token_id 7 and eos_token_id [9]" in out


def command(*argv):
    """Returns (exit status, stderr) of `python -m jaxtrain.interop`, run in this process."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(_parse(["interop", *map(str, argv)]))
    return ended.value.code, err.getvalue()


@pytest.fixture(scope="module")
def broken(exported, tmp_path_factory):
    """A folder of inputs that every command must refuse."""
    root = tmp_path_factory.mktemp("broken")
    (root / "empty").mkdir()
    (root / "killed").mkdir()
    (root / "killed" / ".job").touch()  # left by a job that was killed as it started
    (root / "file").write_text("text")
    shutil.copytree(exported[1], root / "cut")
    whole = (root / "cut/model.safetensors").read_bytes()
    (root / "cut/model.safetensors").write_bytes(whole[:1_000])
    shutil.copytree(exported[1], root / "nan")
    tensors = load_file(root / "nan/model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, root / "nan/model.safetensors")
    (root / "torch.bin").write_bytes(b"PK\x03\x04" * 300)
    return root


@pytest.mark.parametrize(
    "line, message",
    [
        ("import --from={}/none --run={}/x", "--from must be .*; .*/none does not exist"),
        ("import --from={}/nan --run={}/x", "model.norm.weight has 1 NaN and 0 infinite of 32"),
        ("import --from={}/torch.bin --run={}/x --tokenizer=bytes", "torch.save wrote it: set"),
        ("import --from={}/torch.bin --run={}/killed --tokenizer=bytes", "torch.save wrote it"),
        ("import --from={}/empty --run={}/x", "must contain config.json; got none in .*/empty"),
        ("import --from={}/file --run={}/x --tokenizer=bytes", "llm.c model must start with"),
        (
            "import --from={}/cut --run={}/x",
            "model.safetensors must be a complete safetensors file",
        ),
        ("import --from={hf} --run={}", "must go to a new folder; .* is not empty. Set --run"),
        ("import --from={hf} --run={}/file", "must go to a new folder; .*/file is a file"),
        ("import --from={hf} --run={}/file/x", "/file/x: Not a directory .*Set --run"),
        ("import --from={hf} --run={}/x --text={}/none", "--text must be .*/none"),
        ("import --from={hf} --run={}/x --shards={}/none", "--shards must .* Set --shards"),
        ("import --from={hf} --run={}/x --tokenizer=none", "--tokenizer must be .* --tokenizer"),
        ("import --from={hf} --run={}/x --tokenizer=gpt2", "gpt2 has 50,257 tokens, .* 256"),
        ("export --run={}/none --to={}/x", "--run must be a run's folder; .*/none does not exist"),
        ("export --run={}/file --to={}/x", "--run must be a run's folder; .*/file is a file"),
        ("export --run={}/empty --to={}/x", "--run must be a run's folder with a config.json"),
        ("export --run={run} --to={}/empty", "must go to a new path; .*/empty exists. Set --to"),
        ("export --run={run} --to={}/file/x", "/file: .*. Set --to"),
        ("export --run={run} --to={}/x --tokenizer=gpt2", "gpt2 has 50,257 tokens, .* 256"),
        ("export --run={run} --to={}/x --tokenizer=no", "got 'no', .* Set --tokenizer. --token"),
        ("export --run={run} --to=/proc/none/x", "/proc/none: .*. Set --to"),
        ("import --from={hf} --run=/proc/none/x", "/proc/none: .*. Set --run"),
        ("export --run={run} --to={}/x --step=2", "step must be one of .*; got 2. Set --step"),
        ("export --run={run} --to={}/x.bin", "reads only GPT-2; got LlamaForCausalLM. Set --to"),
    ],
)
def test_bad_input_ends_in_one_line_with_the_flag_of_this_command(exported, broken, line, message):
    argv = line.replace("{}", str(broken)).format(run=exported[0], hf=exported[1]).split()
    before = sorted(broken.rglob("*"))
    status, err = command(*argv)
    assert status == REFUSED
    lines = [text for text in err.splitlines() if text.startswith("error: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), err
    assert "Traceback" not in err and "--config." not in lines[0]
    assert sorted(broken.rglob("*")) == before


def test_the_export_command_exits_with_the_status_of_bad_input(tmp_path):
    program = "from jaxtrain.interop.__main__ import command\ncommand()"
    out = runs.finish(runs.fork_program(program, "export", f"--run={tmp_path}", "--to=x"), REFUSED)
    assert "Traceback" not in out
    assert out.strip().splitlines()[-1].startswith("error: --run must be a run's folder")
