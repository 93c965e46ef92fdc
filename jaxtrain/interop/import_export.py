"""Creates runs from imported weights, and exports a run's weights and tokenizer."""

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
from jaxtrain.data.tokenizer import Tokenizer, build_tokenizer
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import read_config, read_weights, write_folder
from jaxtrain.interop.hf_files import read_json_object
from jaxtrain.interop.hf_tokenizer import (
    FILE,
    SpecialTokens,
    declared_tokens,
    special_tokens,
    write_generation_config,
    write_tokenizer,
)
from jaxtrain.interop.initial_state import initial_state
from jaxtrain.interop.run_weights import is_imported
from jaxtrain.interop.verify import check_finite, check_reading, check_transformers
from jaxtrain.interop.vocabulary import choose_rows, cut_vocabulary
from jaxtrain.model.trees import named_leaves
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.run_directory.contents import read_config_json
from jaxtrain.run_directory.lock import JOB_FILE, LOCK_FILE, RunLock
from jaxtrain.training.resume import start_state
from jaxtrain.training.run import Run, build_run, restore_run
from jaxtrain.training.startup import build_config_json

EVAL_BATCH = 8  # data.batch of an imported run, which is only evaluated


def import_weights(
    source: Path | str,
    workdir: Path | str,
    text: str = "",
    shards: str = "",
    tokenizer: str = "",
) -> None:
    """Creates a run at step 0 from a Hugging Face folder, an llm.c file or a nanochat checkpoint.

    Args:
        text, shards: held-out data, as data.text and data.shards.
        tokenizer: as data.tokenizer; empty takes the folder's tokenizer.json.

    Raises:
        InteropError: the weights are damaged or of no known family, or `workdir` is not empty.
    """
    folder, out = Path(source), Path(workdir)
    if not folder.exists():
        raise InteropError(
            "--from must be a folder of Hugging Face or nanochat, or an llm.c file; "
            f"{folder} does not exist."
        )
    locks = {LOCK_FILE, JOB_FILE}  # a killed start leaves them
    if out.exists() and (not out.is_dir() or any(path.name not in locks for path in out.iterdir())):
        reason = "is not empty" if out.is_dir() else "is a file"
        raise InteropError(f"an import must go to a new folder; {out} {reason}. Set --run.")
    model = read_config(folder)
    home = folder.parent if folder.is_file() else folder
    own = home / FILE
    tokenizer = tokenizer or (str(own.resolve()) if own.exists() else "")
    if not tokenizer and not shards:
        raise InteropError(
            f"text needs the model's tokenizer; {own} does not exist. Set --tokenizer to 'bytes', "
            "'gpt2' or the path of a tokenizer.json."
        )
    if tokenizer:
        _check_vocab_size(build_tokenizer(tokenizer), model.V)
    data = config_lib.DataConfig(
        text=text,
        shards=shards,
        tokenizer=tokenizer or "bytes",
        batch=EVAL_BATCH,
        seq_len=min(model.positions, 1_024),
        eot=_declared_eot(folder, tokenizer) if folder.is_dir() else -1,
    )
    cfg = config_lib.TrainConfig(
        workdir=str(out),
        weights=str(folder.resolve()),
        model=model,
        data=data,
        mesh=config_lib.MeshConfig(1, 1, 1),
    )
    start_runtime(cfg)
    run = build_run(cfg, jax.local_devices()[:1])
    axes, shapes = named_leaves(run.model.axes), named_leaves(run.model.shapes)
    read_weights(folder, model, axes, shapes)  # raises before anything is written
    with RunLock(out, "--run"):
        try:
            _store_step_0(run, out)
        except BaseException:  # a failed import leaves nothing behind
            shutil.rmtree(out)
            raise
    print(f"{run.parameters:,} parameters of {folder} are step 0 of {out}")
    print(f"next: {shell_command('evaluate', f'--run={out}')}")
    print(f"      {shell_command('generate', f'--run={out}', '--prompt=def main(')}")


def _store_step_0(run: Run, out: Path) -> None:
    """Writes the checkpoint of step 0 and config.json."""
    corpus = open_corpus(run.cfg.data, "train", run.cfg.model.V, out)
    with (
        build_batches(run.cfg.data, corpus, run.mesh, run.cfg.seed) as batches,
        Checkpoints(out / "checkpoints", 1) as checkpoints,
    ):
        run, state, _ = start_state(run, checkpoints, batches, initial_state)
        meta = {"data": batches.state(), "config": config_lib.flatten(run.cfg)}
        checkpoints.save(0, state, meta)
        checkpoints.wait()
    write_atomic(out / "config.json", strict_json(build_config_json(run, corpus), indent=2) + "\n")


def _check_vocab_size(tokenizer: Tokenizer, V: int) -> None:
    """Raises InteropError if a tokenizer has ids that the model does not."""
    if tokenizer.vocab_size > V:
        raise InteropError(
            f"--tokenizer must be the model's; {tokenizer.name} has {tokenizer.vocab_size:,} "
            f"tokens, but the weights have rows for {V:,}."
        )


def _declared_eot(folder: Path, tokenizer: str) -> int:
    """Returns data.eot of an import: -1 if a tokenizer defines it, else the folder's start token.

    Prints a line if the tokenizer's start token is not one of the folder's special tokens.
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


def export_weights(
    workdir: Path | str,
    to: Path | str,
    dtype: str = "float32",
    step: int | None = None,
    tokenizer: str = "",
) -> None:
    """Writes the weights that evaluation uses as a Hugging Face folder or an llm.c file.

    Args:
        to: must not exist; a name that ends in .bin is an llm.c file.
        step: checkpoint to export; None takes the newest good one.
        tokenizer: as data.tokenizer; empty takes the run's, "none" writes no tokenizer files.
            Rows of the vocabulary that only pad it are removed.

    Raises:
        InteropError: no family computes the model, or the export computes something else.
    """
    if not str(workdir).strip():
        raise InteropError(f"--run must name a folder; got {workdir!r}.")
    if not Path(workdir).is_dir():
        reason = "is a file" if Path(workdir).exists() else "does not exist"
        raise InteropError(f"--run must be a run's folder; {workdir} {reason}.")
    read_config_json(workdir)  # raises if the folder contains no run
    to = Path(to)
    if to.exists():
        raise InteropError(f"an export must go to a new path; {to} exists. Set --to.")
    run_tokenizer = _build_run_tokenizer(workdir, tokenizer)
    run, state = restore_run(workdir, step)
    params, data = eval_params(state.opt_state, state.params), run.cfg.data
    cfg = run.cfg.model
    if run_tokenizer is not None:
        _check_vocab_size(run_tokenizer, cfg.V)
    # RoPE has no table of positions, so the model supports the length that it was trained on. Only
    # imported weights may declare another length.
    imported = is_imported(run.cfg.weights)
    if cfg.position == "rope" and not imported:
        cfg = dataclasses.replace(cfg, positions=data.seq_len)
    special, checks = special_tokens(run_tokenizer, data.eot, _source_folders(run.cfg)), []
    rows, vocabulary = choose_rows(run_tokenizer, special, cfg.V, imported)
    cfg, axes = dataclasses.replace(cfg, V=rows), named_leaves(run.model.axes)
    named = cut_vocabulary(axes, named_leaves(params), rows)

    def write_tokenizer_and_verify(hidden):
        if hidden.is_dir():
            write_generation_config(hidden, special, run_tokenizer, cfg.V)
            if run_tokenizer is not None:
                write_tokenizer(hidden, run_tokenizer, special, cfg.positions)
        reference = check_reading(hidden, cfg, axes, named, dtype)
        checks.append("checked: reading it back gives the same weights and logits")
        if hidden.is_dir():
            checks.append(check_transformers(hidden, cfg, reference, run_tokenizer))

    check_finite(named, dtype)
    write_folder(to, cfg, axes, named, dtype, write_tokenizer_and_verify, special=special.fields())
    kind = (
        read_json_object(to / "config.json")["architectures"][0] if to.is_dir() else "llm.c's GPT-2"
    )
    print(f"step {int(state.step)} of {workdir} is exported to {to}: {kind}, {dtype}")
    print("\n".join([*checks, vocabulary]))
    if to.is_dir():
        ready = checks[-1].startswith("checked")
        title = "next" if ready else "next, with transformers"
        _print_usage(to, run_tokenizer, special, cfg, title)


def _build_run_tokenizer(workdir: Path | str, name: str) -> Tokenizer | None:
    """Returns the tokenizer `name`, or by default the run's; None if there is none.

    Raises:
        InteropError: the run's tokenizer.json no longer exists.
    """
    own = read_config_json(workdir)["data"].get("tokenizer") or "none"
    # The recorded path is absolute; a run that was moved still has data/KEY/tokenizer.json.
    inside = Path(workdir, *Path(own).parts[-3:])
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


def _source_folders(cfg: config_lib.TrainConfig) -> list[Path]:
    """Returns the folders that a run's tokenizer and weights came from."""
    named = [Path(name) for name in (cfg.data.tokenizer, cfg.weights) if name]
    return [path.parent if path.is_file() else path for path in named if path.exists()]


def _print_usage(
    to: Path,
    tokenizer: Tokenizer | None,
    special: SpecialTokens,
    cfg: config_lib.ModelConfig,
    title: str,
) -> None:
    """Prints the special tokens of an exported folder, and a command that samples from it."""
    path = json.dumps(str(to), ensure_ascii=False)
    if tokenizer is None:
        ids = f"data.eot={special.bos}" if special.eos else "null"
        print(f"no tokenizer files are written, bos and eos are {ids}. See --tokenizer")
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
        print("note: the run computed in bfloat16; float32 may choose other tokens")
    print(f"{title}: {python_program()} -c {shlex.quote(code)}")
