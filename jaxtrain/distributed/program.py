"""Runs a command's main function, and turns its errors into one line and an exit status.

| status | meaning |
|---|---|
| 0 | success |
| 1 | an unexpected error, printed with its traceback |
| PREEMPTED (75) | a signal stopped the run and nothing is lost; the same command resumes it |
| REFUSED (78) | bad input, damaged checkpoint, full disk, too little memory: one line explains it |
| INTERRUPTED (130) | Ctrl-C |

The constants are in jaxtrain/errors.py. A launcher restarts a job after 75, and never after 78.
"""

import io
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from absl import app, logging

from jaxtrain.config.command_line import CommandForm, parse
from jaxtrain.distributed.preemption import interruptible
from jaxtrain.distributed.runtime import exit_process, exit_together
from jaxtrain.errors import INTERRUPTED, REFUSED, CheckpointError
from jaxtrain.file_errors import describe_error, is_file_error

NO_FLAGS = CommandForm("", "")


def run_main(
    main: Callable[..., int | None],
    errors: Sequence[type[Exception]] = (),
    form: CommandForm = NO_FLAGS,
    argv: list[str] | None = None,
    prog: str = "python -m jaxtrain",
) -> None:
    """Reads the command line, runs main, and exits the process with the status that main returns.

    With several processes, all exit together if main returns. A process whose main raises exits at
    once: it cannot wait for the others, which may be waiting for it.

    Args:
        main: the command. Its argument is the list of words, if `form` accepts any words.
        errors: exceptions to print in one line, besides ValueError and CheckpointError.
        form: what the command line may contain.
        argv: the arguments; by default those of the process.
        prog: what the user typed to start the command.
    """

    def run_and_exit(words: list[str]) -> None:
        # Text that the terminal cannot show, such as a file name that is not UTF-8, is escaped
        # instead of ending the run. A caller may have replaced stdout by another object.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with interruptible():
                status = main(words) if form.words else main()
            exit_together(status)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            exit_process(INTERRUPTED)
        except Exception as error:
            if (reason := _describe_refusal(error, errors)) is not None:
                logging.debug("the full traceback:", exc_info=True)
                exit_refused(reason)
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            exit_process(1)

    argv = sys.argv[1:] if argv is None else argv
    app.run(run_and_exit, argv=[prog, *argv], flags_parser=lambda argv: parse(form, prog, argv[1:]))


def _describe_refusal(error: Exception, errors: Sequence[type[Exception]]) -> str | None:
    """Returns the message of an error that a restart would only repeat; None for others."""
    if isinstance(error, (ValueError, CheckpointError, *errors)) and not is_runtime_error(error):
        return str(error)
    if is_file_error(error):
        return describe_error(error)
    if is_out_of_memory(error):
        return describe_out_of_memory(error)
    return None


def is_runtime_error(error: BaseException) -> bool:
    """Returns whether JAX's runtime raised the error.

    The type does not show it: a collective whose peer has died raises a plain ValueError.
    """
    return bool(re.match(r"(UNKNOWN|UNAVAILABLE|ABORTED|INTERNAL|DEADLINE_EXCEEDED): ", str(error)))


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether a device ran out of memory; a full disk is RESOURCE_EXHAUSTED, too."""
    return bool(re.match(r"RESOURCE_EXHAUSTED: .*out of memory", str(error), re.I | re.S))


def describe_out_of_memory(error: BaseException) -> str:
    """Returns the error of a device that ran out of memory, with the flags that reduce it."""
    return (
        f"the step must fit in the device's memory; got {str(error).splitlines()[0]} Raise "
        "--accumulation, or set --model.remat=attention or --model.remat=full, which store less; "
        "python -m jaxtrain.plan --fit shows what fits a GPU."
    )


def exit_refused(reason: object) -> NoReturn:
    """Prints the reason, and exits with status REFUSED."""
    print(f"error: {reason}", file=sys.stderr)
    exit_process(REFUSED)
