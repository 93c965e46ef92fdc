import json
import os
import shlex
import shutil
import subprocess
import sys

import jax
import pytest

import runs
from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.config.shell_commands import jaxtrain_program
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.errors import REFUSED
from jaxtrain.generate import tokenizer_name
from jaxtrain.interop.initial_state import initial_state
from jaxtrain.metrics.names import measured_names
from jaxtrain.run_directory.contents import load_train_config
from jaxtrain.train import open_data, train
from jaxtrain.training.evaluation import token_limit
from jaxtrain.training.finish import next_commands
from jaxtrain.training.loop import Diverged
from jaxtrain.training.resume import start_state
from jaxtrain.training.run import build_run, restore_run
from jaxtrain.training.startup import startup_lines
from launch.report.formats import grouped, seconds
from launch.report.run_folder import read_run


def config(workdir, text, **values):
    """Returns a config whose optimizer uses float32, so that different meshes agree to 1e-5."""
    return runs.debug_config(workdir, text, **{"optim__ns_dtype": "float32"} | values)


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    with runs.shared_steps():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def tasks(text):
    """A value of eval.tasks: last words, and a held-out text."""
    path = text.parent / "sums.jsonl"
    lines = [{"text": f"{a} plus 2 is {a + 2}"} for a in range(1, 20)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return f"sums={path} again={text}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text, tasks):
    """The directory of a finished run of 40 steps."""
    workdir = tmp_path_factory.mktemp("trained")
    cfg = config(workdir, text, steps=40, model__L=1, eval__tasks=tasks)
    assert train(cfg, jax.devices()[:1], quiet=True) == 0
    return workdir


PLAIN = dict(optim__name="adamw", model__L=1, model__attention="reference")  # compile fastest
PLAIN |= dict(steps=10, sample__tokens=0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, text):
    """The directory of a finished run of PLAIN, which other tests repeat or resume."""
    workdir = tmp_path_factory.mktemp("plain")
    assert train(config(workdir, text, **PLAIN), jax.devices()[:1], quiet=True) == 0
    return workdir


def test_a_run_learns_its_text(trained):
    logged = dict(runs.losses(trained))
    assert list(logged) == list(range(1, 41))
    assert logged[40] < logged[1] - 2.0


def test_a_finished_run_directory_has_config_summary_curve_and_checkpoints(trained):
    names = {path.name for path in trained.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "loss_curve.png",
        "checkpoints",
    } <= names
    stored = json.loads((trained / "config.json").read_text())
    assert {"config", "config_hash", "versions", "routes", "data", "command"} <= set(stored)
    assert tokenizer_name(trained) == stored["data"]["tokenizer"] == "bytes"
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["step"] == 40 and summary["eval/loss_nats"] < 3.5
    bits = summary["eval/loss_nats"] * 1.442695  # each token is a byte, or starts a document
    assert summary["eval/bits_per_byte"] == pytest.approx(bits, rel=1e-3)


def test_a_run_directory_has_step_times_utilisation_and_lost_time(trained):
    stored = json.loads((trained / "config.json").read_text())
    assert stored["processes"] == len(stored["hosts"]) == 1 and stored["chip"] is None
    work = stored["work"]
    assert work["tokens_per_step"] == 256 and work["params"] == 25_712
    assert work["flops_causal_per_step"] > work["flops_6n_per_step"] > 6 * 256 * 16_000
    assert work["hbm_bytes_per_step"] > 4 * work["params"] and work["collectives"] == []
    host = runs.read_metrics(trained / "hosts" / "0.jsonl")
    assert [line["step"] for line in host if "event" not in line] == list(range(1, 41))
    summary = json.loads((trained / "summary.json").read_text())
    good_s = summary["perf/goodput"] * summary["perf/wall_s"]
    lost = summary["lost_s"]
    assert good_s + sum(lost.values()) == pytest.approx(summary["perf/wall_s"], rel=1e-6)
    assert {"compile", "start", "save", "eval", "sample", "other"} <= lost.keys()
    logged = {name for line in runs.read_metrics(trained / "metrics.jsonl") for name in line}
    measured = {name for name in logged if name.split("/")[0] in ("perf", "data", "comm")}
    assert len(measured) > 8 and measured <= measured_names().keys()


def test_a_resumed_run_prints_the_step_times_that_launch_summary_shows(
    plain, text, tmp_path, capsys
):
    """Both exclude the first step of each start."""
    shutil.copytree(plain, tmp_path / "run")
    cfg = config(tmp_path / "run", text, **PLAIN | {"steps": 14, "optim__total_steps": 10})
    assert train(cfg, jax.devices()[:1]) == 0
    out = capsys.readouterr().out
    figures = read_run(tmp_path / "run").figures
    assert figures
    for metric, name in (("time_s", "p50"), ("time_p95_s", "p95"), ("time_p99_s", "p99")):
        assert f"{name} {seconds(figures[f'perf/step_{metric}'])}" in out
    assert f"{grouped(figures['perf/tokens_per_s'])} tok/s".replace("\u202f", " ") in out
    first = [r["step"] for r in runs.read_metrics(tmp_path / "run/hosts/0.jsonl") if "first" in r]
    assert first == [1, 11]


def check_evaluate(trained, out):
    """Checks that evaluate prints what summary.json has."""
    figures = json.loads(out.splitlines()[-1])
    summary = json.loads((trained / "summary.json").read_text())
    assert (figures.pop("step"), figures["eval/sums_examples"]) == (40, 19)
    # Evaluate reads all of the text `again`, of which the run read a part.
    same = {name: x for name, x in figures.items() if not name.startswith("eval/again")}
    assert {"eval/loss_nats", "eval/sums_accuracy"} <= same.keys() < figures.keys()
    assert same == pytest.approx({name: summary[name] for name in same}, rel=1e-5)


def check_generate(out):
    assert out.count("\n1 plus") == 2 and out.count("\n59 \\xe9") == 2
    for i in range(1, 5):
        assert f"--- sample {i} of 4 " in out
    assert "4 x 8 tokens" in out and "tokens/s" in out


@pytest.mark.long
def test_the_commands_printed_after_a_run_work_in_an_ascii_locale_too(trained):
    """The run used one device, and evaluate uses eight."""
    title, *lines = next_commands(trained)
    assert title == "next:" and len(lines) == 3
    pipes = {"capture_output": True, "text": True, "timeout": 240, "cwd": runs.ROOT}
    for line, name in zip(lines, ("evaluate", "generate", "summary"), strict=True):
        assert line.startswith(f"  {jaxtrain_program()} {name} ")
        arguments = line.removeprefix(f"  {jaxtrain_program()} {name} ")
        if name == "evaluate":
            process = runs.fork_command(name, *shlex.split(arguments))
            printed, errors = process.communicate()
            assert process.returncode == 0, errors
            check_evaluate(trained, printed)
            continue
        module, env = "launch.summary", os.environ.copy()
        if name == "generate":
            module, env = "jaxtrain.generate", env | runs.ASCII
            arguments += " --prompt='1 plus' --prompt='59 é' --tokens=8"
        pasted = f"{sys.executable} -m {module} {arguments}"
        done = subprocess.run(pasted, shell=True, env=env, **pipes)
        assert done.returncode == 0, done.stderr
        if name == "generate":
            check_generate(done.stdout + done.stderr)


class Tracker:
    """Stores what it gets."""

    written, summaries = [], []

    def start(self, workdir, resume_step, config):
        assert config["config"]["steps"] == 10 and resume_step == 0

    def write(self, step, time_s, metrics):
        self.written.append({"step": step, "time": time_s} | metrics)

    def finish(self, summary):
        self.summaries.append(summary)


@pytest.mark.long
def test_trace_phases_exports_and_diagnosis_change_no_loss(tmp_path, text, plain):
    extras = dict(profile__steps=2, measure__phases=True, export__port=runs.free_port())
    extras["export__tracker"] = f"{__name__}:Tracker"
    cfg = config(tmp_path, text, **PLAIN, **extras, eval_tokens=256, diagnose_every=5)
    train(cfg, jax.devices()[:1], quiet=True)
    assert Tracker.written == runs.read_metrics(tmp_path / "metrics.jsonl")
    assert Tracker.summaries == [json.loads((tmp_path / "summary.json").read_text())]
    assert runs.losses(tmp_path) == runs.losses(plain)
    records = runs.read_metrics(tmp_path / "metrics.jsonl")
    assert any("perf/phase_forward_backward_s" in record for record in records)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    name = "optim/matrices/momentum_stable_rank"
    assert [record["step"] for record in records if name in record] == [5, 10]
    assert not any(name in record for record in runs.read_metrics(plain / "metrics.jsonl"))


def test_a_short_run_evaluates_no_more_tokens_than_it_trained_on(plain):
    cfg = load_train_config(plain)
    trained_on = cfg.steps * cfg.data.batch * cfg.data.seq_len
    read = json.loads((plain / "summary.json").read_text())["eval/tokens"]
    assert read <= trained_on < cfg.eval_tokens


def test_starting_a_finished_run_again_prints_that_nothing_is_left_and_logs_nothing(
    trained, text, capsys
):
    before = (trained / "metrics.jsonl").read_bytes()
    assert train(config(trained, text, steps=40, model__L=1), jax.devices()[:1]) == 0
    assert "nothing left to train" in capsys.readouterr().out
    assert (trained / "metrics.jsonl").read_bytes() == before


def resume_lines(cfg) -> list:
    """Returns the (name, value) lines that a resumed run prints when it starts."""
    run = build_run(cfg, jax.devices()[:1])
    corpus = open_corpus(cfg.data, "train", cfg.model.V, cfg.workdir)
    with (
        build_batches(cfg.data, corpus, run.mesh, cfg.seed) as batches,
        Checkpoints(f"{cfg.workdir}/checkpoints", 2, read_only=True) as checkpoints,
    ):
        run, _, restored = start_state(run, checkpoints, batches, initial_state)
        return list(startup_lines(run, corpus, checkpoints, restored))


def test_a_resumed_run_prints_the_values_that_changed(trained, text, tasks):
    changes = {"steps": 41, "optim__learning_rate": 0.01}
    lines = resume_lines(config(trained, text, model__L=1, eval__tasks=tasks, **changes))
    steps = {"steps 41, was 40", "optim.total_steps 41, was 40"}
    changed = {value for name, value in lines if name == "resumed with"}
    assert changed == steps | {"optim.learning_rate 0.01, was 0.02"}


@pytest.mark.parametrize(("warmup_steps", "warns"), [(40, False), (41, True)])
def test_a_warm_up_longer_than_the_run_is_warned_of(trained, text, warmup_steps, warns):
    values = dict(steps=40, model__L=1, optim__warmup_steps=warmup_steps)
    lines = resume_lines(config(trained, text, **values))
    assert any("peak rates are not reached" in value for _, value in lines) == warns


def test_a_run_killed_after_its_last_save_only_evaluates_and_writes_the_summary(
    plain, text, tmp_path
):
    shutil.copytree(plain, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert train(config(tmp_path / "run", text, **PLAIN), jax.devices()[:1], quiet=True) == 0
    summary, before = (
        json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "run", plain)
    )
    assert summary["perf/steps"] == 0
    assert summary["eval/loss_nats"] == before["eval/loss_nats"]
    assert runs.losses(tmp_path / "run") == runs.losses(plain)


def test_other_data_in_the_same_folder_is_refused(trained, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("plus", "and"))
    with pytest.raises(ValueError, match="fingerprint"):
        train(config(trained, other, steps=50, model__L=1), jax.devices()[:1], quiet=True)


def test_a_run_is_restored_with_this_machines_routes_not_those_it_was_trained_with(
    trained, tmp_path, caplog
):
    stored = json.loads((trained / "config.json").read_text())
    stored["config"]["model"]["attention"] = "cudnn"
    stored["config"]["kernels"]["strict"] = True
    (tmp_path / "config.json").write_text(json.dumps(stored))
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    with pytest.raises(ValueError, match="kernels.strict"):
        build_run(load_train_config(tmp_path), jax.devices()[:1])
    with caplog.at_level("INFO"):
        run, state = restore_run(tmp_path)
    assert int(state.step) == 40 and run.cfg.model.attention == "auto"
    assert "model.attention 'auto', was 'cudnn'; kernels.strict False, was True" in caplog.text


def test_too_many_skipped_steps_stop_the_run_and_name_the_flag(tmp_path, text):
    wild = dict(optim__learning_rate=1e38, optim__adam_learning_rate=1e38, optim__warmup_steps=0)
    wild |= PLAIN | dict(steps=30, max_bad_steps=3, save_every=1)
    cfg = config(tmp_path, text, **wild)
    with pytest.raises(Diverged, match="--optim.learning_rate"):
        train(cfg, jax.devices()[:1], quiet=True)
    assert runs.losses(tmp_path)[-1][0] <= 6
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))  # no state was finite


@pytest.mark.long
def test_two_processes_train_as_one_and_one_resumes_their_run(tmp_path, text, tasks, trained):
    """Their mesh of 4 devices agrees with a run on one device, which resumes theirs."""
    values = dict(steps=6, save_every=6, sample__tokens=0, mesh__fsdp=2, mesh__tensor=2)
    values |= dict(model__L=1)
    values |= dict(optim__total_steps=40, optim__ns_dtype="float32", compile_cache="")
    values |= dict(measure__straggler_every=2, measure__straggler_cost=1e3, eval__tasks=tasks)
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]
    folder = tmp_path / "pair"
    processes = [
        runs.fork(folder, text, *flags, *own, devices=2) for own in runs.flags_of_processes(2)
    ]
    for process in processes:
        runs.finish(process)
    two, one = dict(runs.losses(folder)), dict(runs.losses(trained)[:6])
    assert list(two) == list(one) == list(range(1, 7))
    assert two == pytest.approx(one, rel=1e-5)
    for i in range(2):
        lines = runs.read_metrics(folder / f"hosts/{i}.jsonl")
        assert [line["step"] for line in lines if line.get("event") == "probe"] == [2, 4, 6]
    # The summary has the metrics of the restored run, on the text and tasks, on 8 devices.
    summary = json.loads((folder / "summary.json").read_text())
    run, state = restore_run(folder)
    evaluator = open_data(run)[1]
    metrics = evaluator.evaluate(state, max_tokens=token_limit(run.cfg))
    assert run.mesh.size == 8 and len([*evaluator.describe()]) == 2
    assert metrics == pytest.approx({name: summary[name] for name in metrics}, rel=1e-5)
    assert evaluator.evaluate(state, lambda: "SIGTERM") is None
    longer = values | dict(steps=10, mesh__fsdp=1, mesh__tensor=1, eval_tokens=256, eval__tasks="")
    train(config(folder, text, **longer), jax.devices()[:1], quiet=True)
    assert dict(runs.losses(folder)) == pytest.approx(dict(runs.losses(trained)[:10]), rel=1e-5)


def test_generate_refuses_a_tokenizer_larger_than_the_models_vocabulary(trained):
    flags = f"--run={trained}", "--tokenizer=gpt2"
    out = runs.finish(runs.fork_command("generate", *flags), REFUSED)
    assert "below model.V=256; got 50256 from gpt2. Set --tokenizer." in out
