"""Trains the model that a config names, resuming from its workdir.

    python -m jaxtrain.train --config=configs/quickstart.py
    python -m jaxtrain.train --config=configs/quickstart.py --config.data.text=PATH
    python -m jaxtrain.train --config=configs/gpt_124m.py --config.data.shards=DIR

The same command resumes a run that was stopped. Ctrl-C and SIGTERM save after the step, or the
evaluation batch, that is under way; a second one ends the process at once. Exit status 75 says
"preempted: start me again", 78 "the same start would fail again". Several processes
find each other by --coordinator, --processes, --process, or by what started them (launch.run,
SLURM's srun, mpirun, JAX_* variables).
"""

import json
import os
import socket
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

import jaxtrain.config as config_lib
from jaxtrain.about import header, measured, stored_config, versions
from jaxtrain.agree import from_process_0, of_all
from jaxtrain.beat import beat
from jaxtrain.checkpoint import Checkpoints
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.engine import World, detect
from jaxtrain.generate import complete, fit_positions
from jaxtrain.interop.start import check_model, check_resumed, load_params
from jaxtrain.invocation import command, typed
from jaxtrain.knobs import describe
from jaxtrain.loop import Diverged, Loop
from jaxtrain.measure import Measure, open_wire
from jaxtrain.mesh import param_sharding
from jaxtrain.moved import check_not_moved
from jaxtrain.optim.accelerated import evaluated
from jaxtrain.precision import resolve
from jaxtrain.report import Report, set_up_logging
from jaxtrain.run import build_run, compile_diagnosis, compile_step, run_main
from jaxtrain.runtime import fit_world, same_everywhere, start_runtime
from jaxtrain.step import abstract_state, init_state
from jaxtrain.steplog import StepLog
from jaxtrain.stop import Stop, status_of
from jaxtrain.work import build_work, find_device_chip

PROMPT_TOKENS = 64  # of held-out text, where sample.prompt is empty


def print_sample(loop, corpus):
    """Prints text from the trained weights, and how fast it came."""
    cfg = loop.cfg.sample
    if not cfg.tokens:
        return
    if corpus.tokenizer_name is None:
        loop.report.note("no sample: the shards do not name their tokenizer")
        return
    tokenizer = build_tokenizer(corpus.tokenizer_name)
    ids = loop.held_out.read(0, 1, 1 + PROMPT_TOKENS)
    if cfg.prompt:
        ids = tokenizer.encode(cfg.prompt)
    prompt_tokens, tokens = fit_positions(loop.cfg.model, len(ids), cfg.tokens)
    if (prompt_tokens, tokens) != (len(ids), cfg.tokens):
        loop.report.note(
            f"the sample is {tokens} of sample.tokens={cfg.tokens} after {prompt_tokens} of "
            f"{len(ids)} prompt tokens: model.positions={loop.cfg.model.positions}"
        )
    if not tokens:
        return
    ids = ids[len(ids) - prompt_tokens :]
    with loop.measure.pause("sample"):
        texts, tokens_per_s = complete(
            loop.run, loop.state, tokenizer, [ids], tokens, cfg.temperature, cfg.top_k
        )
    rule, prompt = "-" * 80, tokenizer.decode(ids)
    loop.report.note(f"sample, {tokens_per_s:,.0f} tokens/s; what follows the bar is the model's")
    loop.report.note(f"{rule}\n{prompt}|{texts[0]}\n{rule}")


def train(cfg, devices=None, quiet=False, stop=None) -> int:
    """Trains up to cfg.steps, resuming from cfg.workdir if it holds a checkpoint.

    Args:
        stop: an entered Stop, which ends the process if a signal comes before the first step;
            None leaves signals alone until then.

    Returns:
        the exit status: 0, or that of the signal that asked for a save.
    """
    started_s = time.perf_counter()
    stop = stop or Stop(jax.process_count() > 1)
    cfg, dtype_reason = resolve(cfg, (devices or jax.devices())[0], cfg.workdir)
    run = build_run(cfg, devices)
    workdir = Path(cfg.workdir)
    stop.starting("reading the data")
    corpus = open_corpus(cfg.data, "train", cfg.model.V, workdir)
    held_out = open_corpus(cfg.data, "val", cfg.model.V, workdir)
    same_everywhere("the data", corpus.fingerprint)
    title = f"{workdir.name}\n{run.parameters:,} parameters"
    with (
        build_batches(cfg.data, corpus, run.mesh, cfg.seed) as batches,
        Checkpoints(
            workdir / "checkpoints",
            cfg.keep_last,
            cfg.keep_every,
            storage=cfg.checkpoint.storage,
        ) as checkpoints,
    ):
        stop.starting("making or restoring the weights")
        state, restored = start_state(run, checkpoints, batches)
        if restored is None and cfg.checkpoint.storage == "host0":
            check_not_moved(workdir, checkpoints.steps())
        first = int(state.step)
        active = jax.process_index() == 0
        if from_process_0(lambda: is_finished(workdir, cfg.steps, first)):
            if active:
                print(f"nothing left to train: {workdir} is at step {first} of {cfg.steps}")
            return 0
        about = (workdir, cfg.steps, first, quiet, active, title, cfg.export)
        with Report(*about) as report:
            hosts = of_all(socket.gethostname())
            report.header(header(run, corpus, checkpoints, restored, dtype_reason))
            report.write_config(stored_config(run, corpus, hosts))
            beat("compile", first)
            stop.starting("compiling the step")
            step, diagnosis = compile_all(run, report, first)
            work = build_work(run, step.compiled, hosts)
            with open_measure(run, work, hosts, first, checkpoints) as measure:
                report.write_config(stored_config(run, corpus, hosts, work, measure))
                report.header(measured(run, work, measure))
                loop = Loop(
                    run, state, step, diagnosis, batches, held_out, checkpoints, report, measure
                )
                del state  # the loop donates it
                with stop:
                    measure.start(before_s(step, diagnosis, report, started_s))
                    return finish(loop, corpus, loop.run_to_end(stop))


def compile_all(run, report, first):
    """(step, diagnosis or None), compiled; how long that took is reported."""
    step = compile_step(run)
    report.note(f"compiled in {step.compile_s:.1f} s")
    report.write(first, {"perf/compile_time_s": step.compile_s})
    diagnosis = compile_diagnosis(run) if run.cfg.diagnose_every else None
    if diagnosis:
        report.note(f"diagnosis compiled in {diagnosis.compile_s:.1f} s")
    return step, diagnosis


def open_measure(run, work, hosts, first, checkpoints) -> Measure:
    """The Measure of this process."""
    log = StepLog(Path(run.cfg.workdir), jax.process_index(), first)
    chip = find_device_chip(run.mesh.devices.flat[0])
    return Measure(work, chip, log, open_wire(hosts), checkpoints.is_saving)


def before_s(step, diagnosis, report, started_s) -> dict:
    """{cause: seconds} of a run before its first step, and of steps that it has to make again."""
    compile_s = step.compile_s + (diagnosis.compile_s if diagnosis else 0.0)
    start_s = time.perf_counter() - started_s - compile_s
    return {"start": start_s, "compile": compile_s, "restart": report.removed_s}


def is_finished(workdir, steps, first) -> bool:
    """Whether the last step is saved, evaluated and summed up."""
    try:
        summary = json.loads((workdir / "summary.json").read_text())
    except FileNotFoundError:
        return False
    ended = summary["stopped_by"] is None and "eval/loss_nats" in summary
    return ended and first == steps == summary["step"]


def first_state(run):
    """Step 0: parameters drawn, or those of cfg.weights.

    Raises:
        InteropError: the weights are damaged, or of another model.
    """
    source, model = run.cfg.weights, run.model
    if source:
        check_model(run.cfg.model, source)  # before memory is taken
    state = init_state(model, run.optimizer, run.mesh, run.cfg.seed)
    if not source:
        return state
    place = lambda axes, x: param_sharding(axes, x.shape, run.mesh)
    at = jax.tree.map(place, model.axes, model.shapes)
    return state._replace(params=load_params(source, run.cfg.model, model.axes, model.shapes, at))


def start_state(run, checkpoints, batches):
    """(TrainState, the Restored that it is from or None), with `batches` at the same step.

    Raises:
        ValueError: the checkpoint is of other data or another model, or past the last step.
    """
    restored = checkpoints.restore(abstract_state(run.model, run.optimizer, run.mesh))
    if restored is None:
        return first_state(run), None
    batches.restore(restored.meta["data"])
    check_resumed(run.cfg.model, restored.meta["config"])
    if restored.step > run.cfg.steps:
        raise ValueError(
            f"steps must be at least the checkpoint's step {restored.step}; got "
            f"steps={run.cfg.steps}. Set --config.steps or another --config.workdir."
        )
    return restored.state, restored._replace(state=None)  # the loop donates it


def finish(loop, corpus, told) -> int:
    """Evaluates, samples and sums up a run that is through; says how to resume one that is not."""
    cfg, report = loop.cfg, loop.report
    beat("end")
    if told is None and loop.evaluate(cfg.steps) is None:
        told = loop.stop.signal
    if told is None:
        loop.stop.serve("ending after the sample")
        print_sample(loop, corpus)
    with loop.measure.pause("save"):
        loop.checkpoints.wait()
    ended = {"stopped_by": told and told.name, "versions": versions()}
    ended["eval_at"] = evaluated(loop.state.opt_state)
    report.finish(loop.measure.total() | ended)
    if told is None:
        for line in next_commands(cfg.workdir):
            report.note(line)
        return 0
    saved = f"saved step {loop.saved_step}" if loop.saved_step else "saved no step"
    report.note(f"{saved} of {cfg.steps}; the same command resumes it")
    return status_of(told)


def next_commands(workdir):
    """Yields what to do with a run that has ended: a command a line, to paste."""
    run = f"--run={workdir}"
    yield "next:"
    yield f"  {command('evaluate', run)}"
    yield f"  {command('generate', run, '--samples=2')}"
    yield f"  {command('summary', str(workdir))}"


def main() -> int:
    args = flags.FLAGS
    cfg = config_lib.freeze(args.config)
    beat("start")
    by_hand = args.coordinator, args.processes, args.process, None, args.processes
    world = World("flags", *by_hand) if args.processes > 1 else detect(os.environ)
    set_up_logging(world.process)
    with Stop(world.processes > 1) as stop:
        start_runtime(cfg, world)
        cfg = fit_world(cfg, world)
        same_everywhere("the config", config_lib.start_hash(cfg))
        status = train(cfg, stop=stop)
        if stop.signal and status and world.engine == "alone":  # else a launcher starts it again
            print(f"resume with:\n  {typed()}", flush=True)
        return status


__doc__ += "\n" + describe(config_lib.TrainConfig)  # what --help shows

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "config file; --config.NAME=VALUE overrides")
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("coordinator", "", "host:port of process 0, with several processes")
    flags.DEFINE_integer("processes", 1, "processes of this run, over all hosts", lower_bound=1)
    flags.DEFINE_integer("process", 0, "which of them this is", lower_bound=0)
    run_main(main, (Diverged,))
