"""The last stage of a run: a final evaluation, a sample, the summary, and what to do next."""

import signal
from collections.abc import Iterator
from pathlib import Path

from jaxtrain.config.shell_commands import shell_command
from jaxtrain.data.sources import AnyCorpus, list_corpora
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.distributed.heartbeat import beat
from jaxtrain.distributed.preemption import exit_status_of
from jaxtrain.optim.acceleration import describe_evaluated_weights
from jaxtrain.training.loop import Loop
from jaxtrain.training.mixture_report import source_table
from jaxtrain.training.sampling import (
    complete,
    decode_shell_text,
    escape_controls,
    fit_positions,
    shorten_prompt,
)
from jaxtrain.training.startup import library_versions

SAMPLE_FLAG = "--sample.prompt"
PROMPT_TOKENS = 64  # of held-out text, if sample.prompt is empty


def finish_run(loop: Loop, corpus: AnyCorpus, stopped_by: signal.Signals | None) -> int:
    """Writes the summary; a completed run is evaluated and sampled from first.

    Args:
        loop: a Loop whose run_to_end has returned.
        stopped_by: the signal that stopped it before the last step; None if it completed.

    Returns:
        the exit status.
    """
    cfg, logger = loop.cfg, loop.logger
    beat("end")
    if stopped_by is None and loop.evaluate(cfg.steps) is None:
        stopped_by = loop.stop.signal
    if stopped_by is None:
        loop.stop.defer_signals("ending after the sample")
        print_sample(loop, corpus)
    with loop.collector.pause("save"):
        loop.checkpoints.wait()
    summary = {"stopped_by": stopped_by and stopped_by.name, "versions": library_versions()}
    summary["eval_at"] = describe_evaluated_weights(loop.state.opt_state)
    if sources := loop.batches.sources:
        summary["sources"] = sources.read_by(loop.batches.step)
    logger.finish(loop.collector.total() | summary)
    if sources:
        logger.note(source_table(summary["sources"]))
    if stopped_by is None:
        for line in next_commands(cfg.workdir):
            logger.note(line)
        return 0
    saved = f"saved step {loop.saved_step}" if loop.saved_step else "saved no step"
    logger.note(f"{saved} of {cfg.steps}; the same command resumes it")
    return exit_status_of(stopped_by)


def print_sample(loop: Loop, corpus: AnyCorpus) -> None:
    """Prints a prompt, its continuation by the trained weights, and the sampling speed."""
    cfg = loop.cfg.sample
    if not cfg.tokens:
        return
    if corpus.tokenizer_name is None:
        loop.logger.note("no sample: the shards do not name their tokenizer")
        return
    tokenizer = build_tokenizer(corpus.tokenizer_name)
    [held_out, *_] = list_corpora(loop.evaluator.held_out).values()
    ids = held_out.read(0, 1, 1 + PROMPT_TOKENS)
    if cfg.prompt:
        ids = tokenizer.encode(decode_shell_text(cfg.prompt, SAMPLE_FLAG))
    prompt_tokens, tokens = fit_positions(loop.cfg.model, len(ids), cfg.tokens)
    if (prompt_tokens, tokens) != (len(ids), cfg.tokens):
        loop.logger.note(
            f"model.positions={loop.cfg.model.positions} limits the sample to {prompt_tokens} of "
            f"{len(ids)} prompt tokens and {tokens} of sample.tokens={cfg.tokens}"
        )
    if not tokens:
        return
    ids = ids[len(ids) - prompt_tokens :]
    with loop.collector.pause("sample"):
        [sample], tokens_per_s = complete(
            loop.run, loop.state, tokenizer, [ids], tokens, cfg.temperature, cfg.top_k
        )
    rule, prompt = "-" * 80, shorten_prompt(tokenizer.decode(ids))
    loop.logger.note(f"sample, {tokens_per_s:,.0f} tokens/s; the model wrote what follows the bar")
    loop.logger.note(f"{rule}\n{escape_controls(f'{prompt}|{sample.text}')}\n{rule}")


def next_commands(workdir: Path | str) -> Iterator[str]:
    """Yields lines to paste: the commands that evaluate, sample from and summarise a run."""
    run = f"--run={workdir}"
    yield "next:"
    yield f"  {shell_command('evaluate', run)}"
    yield f"  {shell_command('generate', run, '--samples=2')}"
    yield f"  {shell_command('summary', str(workdir))}"
