"""Prints the operands of a step's collectives, which gloo handles one after the other.

    python -m tests.launch_step DEVICES FLAGS...       (flags of jaxtrain.train)

The output is JSON: [[kind, bytes], ...].
"""

import json
import os
import sys

from tests import xla_flags

DEVICES = int(sys.argv.pop(1))
os.environ["XLA_FLAGS"] = xla_flags.flags(DEVICES)

from absl import app, flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from jaxtrain.config import train_config as config_lib  # noqa: E402
from jaxtrain.distributed.runtime import start_runtime  # noqa: E402
from jaxtrain.metrics.hlo_collectives import KINDS, parse_groups  # noqa: E402
from jaxtrain.training.run import build_run, compile_step  # noqa: E402
from pallas_kernels.hlo import Program, bytes_of  # noqa: E402


def operands(program, devices):
    """Yields (kind, bytes of the global array) per operand of each collective across devices."""
    for i, types, times in program.executed():
        kind = i.op.removesuffix("-start")
        if kind in KINDS and len(parse_groups(i.rest, devices)[0]) > 1:
            shards = devices if kind == "all-gather" else 1
            sizes = [shards * bytes_of(types[name]) for name in i.operands]
            yield from times * [(kind.replace("-", "_"), size) for size in sizes]


def main(argv):
    del argv
    cfg = config_lib.freeze(flags.FLAGS.config)
    start_runtime(cfg)
    program = Program(compile_step(build_run(cfg)).compiled.as_text())
    print(json.dumps(list(operands(program, DEVICES))))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config")
    app.run(main)
