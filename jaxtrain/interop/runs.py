"""Runs made of imported weights, and the export of a run's weights and tokenizer."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import jax

from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.config import train_config as config_lib
from jaxtrain.config.shell_commands import python_program, shell_command
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import json_of, read_config, read_weights, write_folder
from jaxtrain.interop.start import initial_state
from jaxtrain.interop.tokenizer import (
    FILE,
    declared_tokens,
    special_tokens,
    write_generation_config,
    write_tokenizer,
)
from jaxtrain.interop.verify import check_finite, check_reading, check_transformers
from jaxtrain.model.trees import named_leaves
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.run_directory.contents import read_config_json
from jaxtrain.run_directory.lock import LOCK_FILE, RunLock
from jaxtrain.training.resume import start_state
from jaxtrain.training.run import build_run, restore_run
from jaxtrain.training.startup import build_config_json

EVAL_BATCH = 8  # an import's, to evaluate it


def import_weights(source, workdir, text="", shards="", tokenizer="") -> None:
    """Makes a run at step 0 of a Hugging Face folder or an llm.c file.

    Args:
        text, shards: what the run is evaluated on, as data.text and data.shards.
        tokenizer: as data.tokenizer; empty is the folder's tokenizer.json.

    Raises:
        InteropError: the weights are damaged, of no known family, or `workdir` holds a run.
    """
    folder, out = Path(source), Path(workdir)
    if not folder.exists():
        raise InteropError(
            f"--from must be a Hugging Face folder or an llm.c file; {folder} does not exist."
        )
    if out.exists() and (not out.is_dir() or any(path.name != LOCK_FILE for path in out.iterdir())):
        found = "is not empty" if out.is_dir() else "is a file"
        raise InteropError(f"an import must go to a new folder; {out} {found}. Set --run.")
    model = read_config(folder)
    home = folder.parent if folder.is_file() else folder
    own = home / FILE
    tokenizer = tokenizer or (str(own.resolve()) if own.exists() else "")
    if not tokenizer and not shards:
        raise InteropError(
            f"text needs the model's tokenizer; {own} is not there. Set --tokenizer to 'bytes', "
            "'gpt2' or the path of a tokenizer.json."
        )
    if tokenizer:
        _check_size(build_tokenizer(tokenizer), model.V)
    data = {"text": text, "shards": shards, "tokenizer": tokenizer or "bytes"}
    data |= {"batch": EVAL_BATCH, "seq_len": min(model.positions, 1_024)}
    data |= {"eot": _declared_eot(folder, tokenizer) if folder.is_dir() else -1}
    cfg = config_lib.TrainConfig(
        workdir=str(out),
        weights=str(folder.resolve()),
        model=model,
        data=config_lib.DataConfig(**data),
        mesh=config_lib.MeshConfig(1, 1, 1),
    )
    start_runtime(cfg)
    run = build_run(cfg, jax.local_devices()[:1])
    axes, shapes = named_leaves(run.model.axes), named_leaves(run.model.shapes)
    read_weights(folder, model, axes, shapes)  # every fault shows before anything is written
    with RunLock(out, "--run"):
        try:
            _store_step_0(run, out)
        except BaseException:  # an import that fails leaves no half of a run
            shutil.rmtree(out)
            raise
    print(f"{run.parameters:,} parameters of {folder} are step 0 of {out}")
    print(f"next: {shell_command('evaluate', f'--run={out}')}")
    print(f"      {shell_command('generate', f'--run={out}', '--prompt=def main(')}")


def _store_step_0(run, out) -> None:
    corpus = open_corpus(run.cfg.data, "train", run.cfg.model.V, out)
    with (
        build_batches(run.cfg.data, corpus, run.mesh, run.cfg.seed) as batches,
        Checkpoints(out / "checkpoints", 1) as checkpoints,
    ):
        state, _ = start_state(run, checkpoints, batches, initial_state)
        meta = {"data": batches.state(), "config": config_lib.flatten(run.cfg)}
        checkpoints.save(0, state, meta)
        checkpoints.wait()
    write_atomic(out / "config.json", strict_json(build_config_json(run, corpus), indent=2) + "\n")


def _check_size(tokenizer, V) -> None:
    if tokenizer.vocab_size > V:
        raise InteropError(
            f"--tokenizer must be the model's; {tokenizer.name} has {tokenizer.vocab_size:,} "
            f"tokens, and the weights have rows for {V:,}."
        )


def _declared_eot(folder, tokenizer) -> int:
    """Returns data.eot of an import: -1 where the tokenizer says it, else what the folder names.

    Prints a line where the tokenizer's choice is none of the folder's special tokens.
    """
    declared = declared_tokens(folder)
    named = [token for token in (declared.bos, *declared.eos) if isinstance(token, int)]
    if not tokenizer:
        return named[0] if named else -1
    chosen = build_tokenizer(tokenizer).eot
    if named and chosen not in named:
        print(
            f"documents start with token {chosen} of {tokenizer}, but {folder} names "
            f"bos_token_id {declared.bos} and eos_token_id {list(declared.eos)}"
        )
    return -1


def export_weights(workdir, to, dtype="float32", step=None, tokenizer="") -> None:
    """Writes a run's weights, those that evaluation sees, as a Hugging Face folder or llm.c file.

    Args:
        tokenizer: as data.tokenizer; empty is the run's, "none" writes no tokenizer files.

    Raises:
        InteropError: no family computes the model, or what was written computes something else.
    """
    if not str(workdir).strip():
        raise InteropError(f"--run must name a folder; got {workdir!r}.")
    if not Path(workdir).is_dir():
        found = "is a file" if Path(workdir).exists() else "does not exist"
        raise InteropError(f"--run must be a run's folder; {workdir} {found}.")
    read_config_json(workdir)  # a folder that holds no run is refused first
    to = Path(to)
    if to.exists():
        raise InteropError(f"an export must go to a new path; {to} exists. Set --to.")
    reader = None if to.suffix == ".bin" else _tokenizer_of(workdir, tokenizer)
    run, state = restore_run(workdir, step)
    params, data = eval_params(state.opt_state, state.params), run.cfg.data
    cfg = run.cfg.model
    if reader is not None:
        _check_size(reader, cfg.V)
    if cfg.position == "rope" and not run.cfg.weights:  # known only of imported weights
        cfg = dataclasses.replace(cfg, positions=data.seq_len)
    axes, named = named_leaves(run.model.axes), named_leaves(params)
    special, checks = special_tokens(reader, data.eot, _homes(run.cfg)), []

    def finish(hidden):
        if hidden.is_dir():
            write_generation_config(hidden, special, reader, cfg.V)
            if reader is not None:
                write_tokenizer(hidden, reader, special, cfg.positions)
        reference = check_reading(hidden, cfg, axes, named, dtype)
        checks.append("checked: read back: the same weights and logits")
        if hidden.is_dir():
            checks.append(check_transformers(hidden, cfg, reference, reader))

    check_finite(named, dtype)
    write_folder(to, cfg, axes, named, dtype, finish, special=special.fields())
    kind = json_of(to / "config.json")["architectures"][0] if to.is_dir() else "llm.c's GPT-2"
    print(f"step {int(state.step)} of {workdir} is in {to}: {kind}, {dtype}")
    print("\n".join(checks))
    if to.is_dir():
        ready = checks[-1].startswith("checked")
        _describe(to, reader, special, cfg, "next" if ready else "next, with transformers")


def _tokenizer_of(workdir, name):
    """Returns the tokenizer of a run, or of --tokenizer; None where there is none.

    Raises:
        InteropError: the run's tokenizer.json is gone.
    """
    own = read_config_json(workdir)["data"].get("tokenizer") or "none"
    inside = Path(workdir, *Path(own).parts[-3:])  # data/KEY/tokenizer.json of a run that was moved
    if Path(own).name == FILE and not Path(own).exists() and inside.is_file():
        own = str(inside)
    name = name or own
    if name == "none":
        return None
    try:
        return build_tokenizer(name)
    except ValueError as error:
        reason = str(error).replace("--data.tokenizer", "--tokenizer")
        raise InteropError(f"{reason} --tokenizer=none exports without one.") from error


def _homes(cfg) -> list[Path]:
    """Returns the folders that a run's tokenizer and weights came from."""
    named = [Path(name) for name in (cfg.data.tokenizer, cfg.weights) if name]
    return [path.parent if path.is_file() else path for path in named if path.exists()]


def _describe(to, tokenizer, special, cfg, title) -> None:
    """Prints what a Hugging Face folder does with text, and the command that uses it next."""
    path = json.dumps(str(to), ensure_ascii=False)
    if tokenizer is None:
        ids = f"data.eot={special.bos}" if special.eos else "null"
        print(f"no tokenizer files: no tokenizer is known. bos and eos are {ids}. See --tokenizer")
        code = "from transformers import AutoModelForCausalLM; "
        code += f"print(AutoModelForCausalLM.from_pretrained({path}))"
    else:
        ends = " or ".join(map(str, special.eos))
        print(f"text starts with token {special.bos}, as in training, and ends at token {ends}")
        code = "from transformers import pipeline; "
        tokens = min(100, cfg.positions // 2)
        code += f'print(pipeline("text-generation", {path})("def main(", max_new_tokens={tokens})'
        code += '[0]["generated_text"])'
    if cfg.dtype == "bfloat16":
        print("note: the run computed in bfloat16; in float32, another token may be the likeliest")
    print(f"{title}: {python_program()} -c {shlex.quote(code)}")
