"""Training in a run directory that is on a full disk, damaged, in use, or of another config."""

import json
import re
import shutil

import jax
import pytest
from small_disk import small_disk

import runs
from jaxtrain.checkpoint.manager import Checkpoints
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
    values = {"steps": STEPS, "sample__tokens": 0, "eval_tokens": 256} | values
    fastest = {"optim__name": "adamw", "model__L": 1, "model__attention": "reference"}  # to compile
    values = fastest | values
    return runs.debug_config(workdir, text, **values)


def train_here(cfg):
    return train(cfg, jax.devices()[:1], quiet=True)


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    with runs.shared_steps():
        yield


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


def run_command(cfg, monkeypatch, capfd):
    """Returns (exit status, lines on stderr) of the train command, run in this process."""
    monkeypatch.setattr("sys.argv", ["train"])

    def main():
        set_up_logging()
        return train_here(cfg)

    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    return ended.value.code, capfd.readouterr().err.splitlines()


@pytest.mark.parametrize("storage", ["shared", "host0"])  # the finished run's is shared
def test_a_full_disk_at_a_save_ends_in_one_line_and_the_freed_disk_resumes(
    finished, text, tmp_path, storage, monkeypatch, capfd
):
    with small_disk(tmp_path / "disk") as disk:
        workdir = shutil.copytree(finished, disk.path / "run")
        cfg = config(workdir, text, steps=12, save_every=6, checkpoint__storage=storage)
        disk.fill(leave=100 << 10)
        status, lines = run_command(cfg, monkeypatch, capfd)
        assert status == REFUSED and len(lines) == 1, "\n".join(lines)
        folder = workdir / "checkpoints"
        assert lines[0].startswith("error: checkpoint 6 was not saved: "), lines
        assert f"{folder}: {disk.reason}" in lines[0]
        assert f"the newest checkpoint is step {STEPS} in {folder}." in lines[0]
        assert [path.name for path in folder.iterdir()] == [str(STEPS)]
        disk.free()
        assert run_command(cfg, monkeypatch, capfd)[0] == 0
        assert [step for step, _ in runs.losses(workdir)] == list(range(1, 13))


def test_a_full_disk_at_a_logged_step_ends_in_one_line(
    finished, text, tmp_path, monkeypatch, capfd
):
    with small_disk(tmp_path / "disk", megabytes=2) as disk:
        workdir = shutil.copytree(finished, disk.path / "run")
        cfg = config(workdir, text, steps=2_000, save_every=2_000)
        disk.fill(leave=100 << 10)
        status, lines = run_command(cfg, monkeypatch, capfd)
        assert status == REFUSED and len(lines) == 1, "\n".join(lines)
        assert re.match(rf"error: {workdir}/\S+: {disk.reason}", lines[0]), lines
        assert f"the newest checkpoint is step {STEPS} in" in lines[0]
        assert len(runs.losses(workdir)) > STEPS  # every line can be read


def test_a_refused_second_start_changes_no_file(workdir, text, monkeypatch, capfd):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with RunLock(workdir):
        names = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
        status, lines = run_command(config(workdir, text, steps=9), monkeypatch, capfd)
        assert status == REFUSED and len(lines) == 1 and "in use by pid" in lines[0], lines
        assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == names
    assert before.keys() == set(workdir.rglob("*"))


def test_a_run_whose_lock_another_run_has_taken_saves_nothing(workdir):
    with RunLock(workdir, wait_s=0.1) as lock:
        (workdir / ".lock").unlink()
        with RunLock(workdir), Checkpoints(workdir / "ck", 1, before_save=lock.check) as first:
            with pytest.raises(ValueError, match="in use by pid"):
                first.save(1, {"w": jax.numpy.ones(3)}, {})
    assert not (workdir / "ck").exists()


GARBLED = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "binary": lambda raw: b"\xff\x00\xfe" + raw[3:],
    "other json": lambda raw: b"[1, null]\n" * 3,
}
# What happens with a damaged file: it is rewritten, named in an error, or not read at all. Damaged
# arrays of checkpoints are tested in test_checkpoint_broken.
DAMAGED = {
    "summary.json": "rewritten",
    "config.json": "rewritten",
    "metrics.jsonl": "named",
    "hosts/0.jsonl": "named",
    "data/*/meta.json": "rewritten",
    "data/*/*_train_*.bin": "rewritten",
    "data/*/*_val_*.bin": "rewritten",
    "checkpoints/*/record/metadata": "named",
    "checkpoints/*/state/manifest.ocdbt": "named",
    "checkpoints/*/state/_METADATA": "not read",
    "checkpoints/*/_CHECKPOINT_METADATA": "not read",
    "loss_curve.png": "not read",
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, consequence in DAMAGED.items()
        for kind in GARBLED
        # Lines that a kill cut off are rewritten: test_reporting_metrics_file.
        if consequence == "named" and not (name.endswith("jsonl") and kind in ("empty", "cut"))
    ],
)
def test_a_damaged_file_is_named_in_one_line(workdir, text, name, kind):
    [path] = workdir.glob(name)
    path.write_bytes(GARBLED[kind](path.read_bytes()))
    cfg = config(workdir, text, steps=STEPS + 1)
    with pytest.raises((ValueError, CheckpointError)) as error:
        train_here(cfg)
    message = str(error.value)
    assert len(message) < 800 and "\n" not in message
    assert path.name in message or f"step {STEPS}: " in message, message


@pytest.mark.parametrize("kind", GARBLED)
def test_a_finished_run_does_not_need_its_other_files(workdir, text, kind, capsys):
    for name, consequence in DAMAGED.items():
        if consequence == "not read":
            [path] = workdir.glob(name)
            path.write_bytes(GARBLED[kind](path.read_bytes()))
    assert train(config(workdir, text), jax.devices()[:1]) == 0
    assert "nothing left to train" in capsys.readouterr().out


def test_damaged_files_that_can_be_derived_are_rewritten(workdir, text, caplog):
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
def test_reading_a_run_names_its_damaged_file(workdir, name, kind):
    [path] = workdir.glob(name)
    path.write_bytes(GARBLED[kind](path.read_bytes()))
    with pytest.raises((ValueError, CheckpointError)) as error:
        load_train_config(workdir)
        Checkpoints(workdir / "checkpoints", 1, read_only=True).read_meta()
    assert path.name in str(error.value)


def test_a_config_json_with_sections_of_another_type_is_named(workdir):
    stored = json.loads((workdir / "config.json").read_text())
    for broken in (None, 3, "text", []):
        stored["config"]["model"] = broken
        (workdir / "config.json").write_text(json.dumps(stored))
        with pytest.raises(ValueError, match=r"config\.json"):
            load_train_config(workdir, {"model.L": 1})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"model__D": 64},
            r"got model\.D=64, not 32\. Set --model\.D, or a new --workdir",
        ),
        (
            {"optim__name": "muon"},
            r"arrays that differ.* Changed: optim\.name 'muon', was 'adamw'",
        ),
        ({"seed": 7}, r"seed"),
        ({"data__batch": 4}, r"data\.batch"),
        ({"steps": 3, "optim__total_steps": 4}, rf"at least the checkpoint's step {STEPS}; got"),
        ({"data__tokenizer": "gpt2", "model__V": 50257}, r"got model\.V=50257, not 256"),
    ],
)
def test_a_run_directory_of_another_config_is_refused_with_what_differs(
    workdir, text, other, message, monkeypatch, capfd
):
    before = (workdir / "metrics.jsonl").read_bytes()
    cfg = config(workdir, text, **({"steps": STEPS + 2} | other))
    status, lines = run_command(cfg, monkeypatch, capfd)
    lines = [line for line in lines if " INFO " not in line]
    assert status == REFUSED and len(lines) == 1 and re.search(message, lines[0]), lines
    assert len(lines[0]) < 800
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_text_that_cannot_be_read_is_named_in_one_line(tmp_path, text, monkeypatch, capfd):
    unreadable = tmp_path / "text.txt"
    unreadable.symlink_to("/proc/self/mem")  # EIO, for root too
    status, lines = run_command(config(tmp_path / "run", unreadable), monkeypatch, capfd)
    lines = [line for line in lines if " INFO " not in line]
    assert status == REFUSED and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert f"{unreadable}: the file cannot be read: Input/output error" in lines[0]


@pytest.mark.parametrize("kind", GARBLED)
def test_a_study_reruns_a_run_whose_summary_is_damaged(workdir, text, kind):
    trial = Trial("c", "a", "s", 0, config(workdir, text))
    assert is_finished(trial)
    path = workdir / "summary.json"
    path.write_bytes(GARBLED[kind](path.read_bytes()))
    assert not is_finished(trial)


@pytest.mark.parametrize("kind", GARBLED)
def test_a_plan_is_computed_again_if_its_cache_file_is_damaged(tmp_path, kind):
    path = tmp_path / "plan.json"
    path.write_text('{"peak_bytes": 1}')
    assert read_cached(path) == {"peak_bytes": 1}
    path.write_bytes(GARBLED[kind](path.read_bytes()))
    assert read_cached(path) is None
