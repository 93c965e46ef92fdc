"""Runs the main function of a command, and turns errors into one line and an exit status."""

import re
import sys
import traceback

import jax
from absl import app, logging

from jaxtrain.config.command_line import CommandForm, parse
from jaxtrain.distributed.preemption import interruptible
from jaxtrain.distributed.runtime import exit_process, exit_together
from jaxtrain.errors import INTERRUPTED, REFUSED, CheckpointError
from jaxtrain.file_errors import describe_error, is_file_error

NO_FLAGS = CommandForm("", "")


def run_main(main, errors=(), form=NO_FLAGS, argv=None, prog="python -m jaxtrain"):
    """Runs main by absl's app.run, and ends the process in one line where it cannot go on.

    Bad input, broken checkpoints and what the file system refuses end with status REFUSED. One of
    several processes ends at once on an error, without waiting at exit for the others.

    Args:
        form: what the command line may hold; main takes its words where it has some.
        argv: the arguments; None is sys.argv's.
        prog: what the user typed to start the command.
    """

    def guarded(words):
        # A terminal or locale that lacks a character, or a name that is no UTF-8, ends no run.
        if hasattr(sys.stdout, "reconfigure"):  # not where a caller has replaced it
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with interruptible():
                status = main(words) if form.words else main()
            exit_together(status)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            exit_process(INTERRUPTED)
        except Exception as error:
            if isinstance(error, (ValueError, CheckpointError, *errors)) and not is_runtime_error(
                error
            ):
                logging.debug("in full:", exc_info=True)
                exit_refused(error)
            if is_file_error(error):
                logging.debug("in full:", exc_info=True)
                exit_refused(describe_error(error))
            if is_out_of_memory(error):
                logging.debug("in full:", exc_info=True)
                exit_refused(describe_out_of_memory(error))
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            exit_process(1)

    argv = sys.argv[1:] if argv is None else argv
    app.run(guarded, argv=[prog, *argv], flags_parser=lambda argv: parse(form, prog, argv[1:]))


def is_runtime_error(error) -> bool:
    """Whether JAX's runtime raised it; that of a collective whose peer has died is a ValueError."""
    return bool(re.match(r"(UNKNOWN|UNAVAILABLE|ABORTED|INTERNAL|DEADLINE_EXCEEDED): ", str(error)))


def is_out_of_memory(error) -> bool:
    """Whether a device's memory did not suffice; a full disk is RESOURCE_EXHAUSTED too."""
    return bool(re.match(r"RESOURCE_EXHAUSTED: .*out of memory", str(error), re.I | re.S))


def describe_out_of_memory(error) -> str:
    """The error of a device's memory with the flags that change what a step takes."""
    return (
        f"a device's memory must hold the step; got {str(error).splitlines()[0]} Raise "
        "--accumulation, or set --model.remat=full; python -m jaxtrain.plan --fit "
        "tells what fits a GPU."
    )


def exit_refused(reason) -> None:
    """Ends the program: the same start would fail again."""
    print(f"error: {reason}", file=sys.stderr)
    exit_process(REFUSED)
