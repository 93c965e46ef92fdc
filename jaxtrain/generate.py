"""Samples text from a run, with a KV cache.

    jaxtrain generate --run=runs/quickstart
    jaxtrain generate --run=runs/quickstart --prompt="def main(" --tokens=200 --samples=4
    jaxtrain generate --run=runs/quickstart --prompt="import " --temperature=0

Restores the newest good checkpoint, or that of --step.
"""

import shutil
from pathlib import Path

from absl import flags

from jaxtrain.config.command_line import CommandForm
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.distributed.program import run_main
from jaxtrain.reporting.terminal import set_up_logging
from jaxtrain.run_directory.contents import read_config_json
from jaxtrain.training.run import restore_run
from jaxtrain.training.sampling import complete, decode_shell_text, escape_controls, shorten_prompt


def check_flags(samples: int, tokens: int, temperature: float, top_k: int) -> None:
    """Raises ValueError if a flag is out of range."""
    values = {"samples": (samples, 1), "tokens": (tokens, 1)}
    values |= {"temperature": (temperature, 0), "top_k": (top_k, 0)}
    for name, (value, low) in values.items():
        if not low <= value < float("inf"):
            raise ValueError(
                f"{name} must be a number of at least {low}; got {value}. Set --{name}."
            )


def tokenizer_name(workdir: Path | str, name: str = "") -> str:
    """Returns `name`, or if it is empty the tokenizer that encoded the run's shards.

    Raises:
        ValueError: the shards do not name their tokenizer.
    """
    name = name or read_config_json(workdir)["data"].get("tokenizer")
    if not name:
        raise ValueError(
            f"the tokenizer of {workdir} must be known; got shards that do not name theirs. Set "
            "--tokenizer to 'bytes', 'gpt2' or the path of a tokenizer.json."
        )
    return name


def main() -> None:
    """Samples from the run that --run names and prints the samples."""
    args = flags.FLAGS
    set_up_logging()
    check_flags(args.samples, args.tokens, args.temperature, args.top_k)
    prompts = [decode_shell_text(prompt, "--prompt") for prompt in args.prompt]
    tokenizer = build_tokenizer(tokenizer_name(args.run, args.tokenizer))
    encoded = [tokenizer.encode(prompt) for prompt in prompts for _ in range(args.samples)]
    V = read_config_json(args.run)["config"]["model"]["V"]
    largest = max(tokenizer.eot, *(max(ids, default=0) for ids in encoded))
    if largest >= V:
        raise ValueError(
            f"the tokenizer's ids must be below model.V={V}; got {largest} from {tokenizer.name}. "
            "Set --tokenizer."
        )
    run, state = restore_run(args.run, args.step or None)
    samples, tokens_per_s = complete(
        run, state, tokenizer, encoded, args.tokens, args.temperature, args.top_k, args.seed
    )
    width = min(shutil.get_terminal_size().columns, 80)
    for i, sample in enumerate(samples):
        prompt = prompts[i // args.samples]
        end = ", the model ended the text" if sample.ended else ""
        print(f"--- sample {i + 1} of {len(samples)}{end} ".ljust(width, "-"))
        print(escape_controls(shorten_prompt(prompt) + sample.text))
    print("-" * width)
    print(f"{len(samples)} x {args.tokens} tokens, {tokens_per_s:,.0f} tokens/s")


def define_flags() -> None:
    """Defines the flags of `jaxtrain generate`."""
    flags.DEFINE_string("run", None, "folder of the run", required=True)
    flags.DEFINE_integer("step", 0, "checkpoint to sample from; 0 is the newest good one")
    flags.DEFINE_string("tokenizer", "", "as data.tokenizer; empty takes that of the run's shards")
    flags.DEFINE_multi_string("prompt", [""], "text to continue; may be given several times")
    flags.DEFINE_integer("samples", 1, "samples per prompt")
    flags.DEFINE_integer("tokens", 256, "tokens per sample")
    flags.DEFINE_float("temperature", 0.7, "0 takes the likeliest token every time")
    flags.DEFINE_integer("top_k", 50, "number of likeliest tokens to draw from; 0 is all")
    flags.DEFINE_integer("seed", 0, "seed of the random draws")


def command(argv: list[str] | None = None, prog: str = "python -m jaxtrain.generate") -> None:
    """Runs the generate command with these arguments, by default those of the process."""
    run_main(main, (), CommandForm("generate", __doc__ or "", define_flags), argv, prog)


if __name__ == "__main__":
    command()
