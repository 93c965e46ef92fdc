"""Run directories that something is wrong with: full, damaged, in use, or of another config."""

import json
import re
import shutil

import jax
import pytest
import runs
from small_disk import small_disk

from configs import debug
from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.config import train_config as config_lib
from jaxtrain.distributed.program import run_main
from jaxtrain.errors import REFUSED, CheckpointError
from jaxtrain.planning.search import read_cached
from jaxtrain.reporting.terminal import set_up_logging
from jaxtrain.run_directory.contents import load_train_config
from jaxtrain.run_directory.lock import RunLock
from jaxtrain.study.plan import Trial
from jaxtrain.study.runs import is_finished
from jaxtrain.train import train

STEPS = 4


def config(workdir, text, **values):
    values = {"workdir": str(workdir), "compile_cache": "", "steps": STEPS} | values
    values |= {"sample__tokens": 0, "eval_tokens": 256}
    config = debug.get_config()
    config.data.text = str(text)
    for name, value in values.items():
        section, _, field = name.rpartition("__")
        setattr(config[section] if section else config, field, value)
    return config_lib.freeze(config)


def train_here(cfg):
    return train(cfg, jax.devices()[:1], quiet=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    workdir = tmp_path_factory.mktemp("finished")
    assert train_here(config(workdir, text)) == 0
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of a finished run's directory, to break."""
    return shutil.copytree(finished, tmp_path / "run")


def end_of(cfg, monkeypatch, capfd):
    """(exit status, lines on stderr) of a run as the command has them."""
    monkeypatch.setattr("sys.argv", ["train"])

    def main():
        set_up_logging()
        return train_here(cfg)

    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    return ended.value.code, capfd.readouterr().err.splitlines()


@pytest.mark.parametrize("storage", ["shared", "host0"])
def test_a_disk_that_is_full_at_a_save_ends_in_one_line_and_loses_nothing(
    finished, text, tmp_path, storage, monkeypatch, capfd
):
    with small_disk(tmp_path / "disk") as disk:
        workdir = shutil.copytree(finished, disk.path / "run")
        cfg = config(workdir, text, steps=12, save_every=6, checkpoint__storage=storage)
        disk.fill(leave=100 << 10)
        status, lines = end_of(cfg, monkeypatch, capfd)
        assert status == REFUSED and len(lines) == 1, "\n".join(lines)
        folder = workdir / "checkpoints"
        assert lines[0].startswith("error: checkpoint 6 was not saved: "), lines
        assert f"{folder}: {disk.reason}" in lines[0]
        assert f"the newest checkpoint is step {STEPS} in {folder}." in lines[0]
        assert [path.name for path in folder.iterdir()] == [str(STEPS)]
        disk.free()
        assert end_of(cfg, monkeypatch, capfd)[0] == 0
        assert [step for step, _ in runs.losses(workdir)] == list(range(1, 13))


def test_a_disk_that_is_full_at_a_logged_step_ends_in_one_line(
    finished, text, tmp_path, monkeypatch, capfd
):
    with small_disk(tmp_path / "disk", megabytes=2) as disk:
        workdir = shutil.copytree(finished, disk.path / "run")
        cfg = config(workdir, text, steps=2_000, save_every=2_000)
        disk.fill(leave=100 << 10)
        status, lines = end_of(cfg, monkeypatch, capfd)
        assert status == REFUSED and len(lines) == 1, "\n".join(lines)
        assert re.match(rf"error: {workdir}/\S+: {disk.reason}", lines[0]), lines
        assert f"the newest checkpoint is step {STEPS} in" in lines[0]
        assert len(runs.losses(workdir)) > STEPS  # every line can be read


def test_a_second_start_beside_a_run_touches_nothing(workdir, text, monkeypatch, capfd):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with RunLock(workdir):
        names = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
        status, lines = end_of(config(workdir, text, steps=9), monkeypatch, capfd)
        assert status == REFUSED and len(lines) == 1 and "in use by pid" in lines[0], lines
        assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == names
    assert before.keys() == set(workdir.rglob("*"))


def test_a_run_that_has_lost_its_directory_to_another_run_saves_nothing(workdir):
    with RunLock(workdir, wait_s=0.1) as lock:
        (workdir / ".lock").unlink()
        with RunLock(workdir), Checkpoints(workdir / "ck", 1, before_save=lock.check) as mine:
            with pytest.raises(ValueError, match="in use by pid"):
                mine.save(1, {"w": jax.numpy.ones(3)}, {})
    assert not (workdir / "ck").exists()


GARBLED = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "binary": lambda raw: b"\xff\x00\xfe" + raw[3:],
    "other json": lambda raw: b"[1, null]\n" * 3,
}
# What may follow from a damaged file, by its pattern: it is written again, or the run ends with
# its name. Checkpoints are in test_checkpoint_broken.
DAMAGED = {
    "summary.json": "again",
    "config.json": "again",
    "metrics.jsonl": "named",
    "hosts/0.jsonl": "named",
    "data/*/meta.json": "again",
    "data/*/*_train_*.bin": "again",
    "data/*/*_val_*.bin": "again",
    "checkpoints/*/record/metadata": "named",
    "checkpoints/*/state/manifest.ocdbt": "named",
    "checkpoints/*/state/_METADATA": "nothing",
    "checkpoints/*/_CHECKPOINT_METADATA": "nothing",
    "loss_curve.png": "nothing",
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, then in DAMAGED.items()
        for kind in GARBLED
        # Lines that a kill has cut off are written again: test_scalars.
        if then == "named" and not (name.endswith("jsonl") and kind in ("empty", "cut"))
    ],
)
def test_a_damaged_file_is_named_in_one_line(workdir, text, name, kind):
    [path] = workdir.glob(name)
    path.write_bytes(GARBLED[kind](path.read_bytes()))
    cfg = config(workdir, text, steps=STEPS + 1)
    with pytest.raises((ValueError, CheckpointError)) as error:
        train_here(cfg)
    said = str(error.value)
    assert len(said) < 800 and "\n" not in said
    assert path.name in said or f"step {STEPS}: " in said, said


@pytest.mark.parametrize("kind", GARBLED)
def test_every_other_file_of_a_finished_run_may_be_damaged(workdir, text, kind, capsys):
    for name, then in DAMAGED.items():
        if then == "nothing":
            [path] = workdir.glob(name)
            path.write_bytes(GARBLED[kind](path.read_bytes()))
    assert train(config(workdir, text), jax.devices()[:1]) == 0
    assert "nothing left to train" in capsys.readouterr().out


def test_what_is_derived_is_written_again_where_it_is_damaged(workdir, text, caplog):
    whole = json.loads((workdir / "summary.json").read_text())
    (workdir / "summary.json").write_text('{"step": 4, "stop')
    (workdir / "config.json").write_text("null")
    [meta] = workdir.glob("data/*/meta.json")
    encoded = meta.read_text()
    meta.write_text(encoded[:100])
    [shard] = workdir.glob("data/*/*_train_*.bin")
    tokens = shard.read_bytes()
    shard.write_bytes(tokens[:2_000])
    assert train_here(config(workdir, text)) == 0
    assert f"{workdir / 'summary.json'} will be rewritten: " in caplog.text
    again = json.loads((workdir / "summary.json").read_text())
    assert again["eval/loss_nats"] == whole["eval/loss_nats"] and again["step"] == STEPS
    assert load_train_config(workdir).steps == STEPS
    assert json.loads(meta.read_text()) == json.loads(encoded)
    assert shard.read_bytes() == tokens


@pytest.mark.parametrize("kind", GARBLED)
@pytest.mark.parametrize("name", ["config.json", "checkpoints/*/record/metadata"])
def test_commands_that_read_a_run_name_its_damaged_file(workdir, name, kind):
    [path] = workdir.glob(name)
    path.write_bytes(GARBLED[kind](path.read_bytes()))
    with pytest.raises((ValueError, CheckpointError)) as error:
        load_train_config(workdir)
        Checkpoints(workdir / "checkpoints", 1, read_only=True).read_meta()
    assert path.name in str(error.value)


def test_a_config_whose_sections_are_no_sections_is_named(workdir):
    stored = json.loads((workdir / "config.json").read_text())
    for broken in (None, 3, "text", []):
        stored["config"]["model"] = broken
        (workdir / "config.json").write_text(json.dumps(stored))
        with pytest.raises(ValueError, match=r"config\.json"):
            load_train_config(workdir, {"model.L": 1})


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"model__D": 64},
            r"got model\.D=64, there 32\. Set --model\.D, or a new --workdir",
        ),
        (
            {"optim__name": "adamw"},
            r"leaves that differ.* Changed: optim\.name 'adamw', was 'muon'",
        ),
        ({"seed": 7}, r"seed"),
        ({"data__batch": 4}, r"data\.batch"),
        ({"steps": 3, "optim__total_steps": 4}, rf"at least the checkpoint's step {STEPS}; got"),
        ({"data__tokenizer": "gpt2", "model__V": 50257}, r"got model\.V=50257, there 256"),
    ],
)
def test_a_run_directory_of_another_config_is_refused_with_what_differs(
    workdir, text, other, said, monkeypatch, capfd
):
    before = (workdir / "metrics.jsonl").read_bytes()
    cfg = config(workdir, text, **({"steps": STEPS + 2} | other))
    status, lines = end_of(cfg, monkeypatch, capfd)
    lines = [line for line in lines if " INFO " not in line]
    assert status == REFUSED and len(lines) == 1 and re.search(said, lines[0]), lines
    assert len(lines[0]) < 800
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_run_may_change_its_storage(workdir, text):
    cfg = config(workdir, text, steps=STEPS + 1, checkpoint__storage="host0")
    assert train_here(cfg) == 0
    assert runs.losses(workdir)[-1][0] == STEPS + 1


def test_a_text_that_cannot_be_read_is_named_in_one_line(tmp_path, text, monkeypatch, capfd):
    unreadable = tmp_path / "text.txt"
    unreadable.symlink_to("/proc/self/mem")  # EIO, for root too
    status, lines = end_of(config(tmp_path / "run", unreadable), monkeypatch, capfd)
    lines = [line for line in lines if " INFO " not in line]
    assert status == REFUSED and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert f"{unreadable}: the file cannot be read: Input/output error" in lines[0]


@pytest.mark.parametrize("kind", GARBLED)
def test_a_damaged_summary_of_a_studys_run_counts_as_none(workdir, text, kind):
    trial = Trial("c", "a", "s", 0, config(workdir, text))
    assert is_finished(trial)
    path = workdir / "summary.json"
    path.write_bytes(GARBLED[kind](path.read_bytes()))
    assert not is_finished(trial)


@pytest.mark.parametrize("kind", GARBLED)
def test_a_plan_that_was_kept_in_a_damaged_file_is_made_again(tmp_path, kind):
    path = tmp_path / "plan.json"
    path.write_text('{"peak_bytes": 1}')
    assert read_cached(path) == {"peak_bytes": 1}
    path.write_bytes(GARBLED[kind](path.read_bytes()))
    assert read_cached(path) is None
