"""An argparse parser whose errors are one line and whose help starts with examples.

pallas_kernels/arguments.py and launch/arguments.py are copies of one file, because neither package
imports the other. A test compares them.
"""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn


def print_text(text: str) -> None:
    """Prints a text; no error if the reader, such as `head`, closes the pipe early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes stdout again when it exits, which would fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def nearest_name(name: str, known: Sequence[str]) -> str:
    """Returns the known name that the user most likely meant; "" if none is similar.

    For a dotted name the last part is enough: `batch` finds `data.batch`.
    """
    same = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    same += [other for other in known if other.startswith(f"{name}.")]
    return next(iter(same or difflib.get_close_matches(name, known, 1)), "")


def unknown_flag_error(name: str, known: Iterable[str]) -> str:
    """Returns the error for a flag that a command does not have."""
    near = nearest_name(name, list(known))
    return f"unknown flag --{name}." + (f" Did you mean --{near}?" if near else "")


def wrong_dash_error(arg: str) -> str:
    """Returns the error for an argument that begins with a typographic dash; "" for others."""
    dashes = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
    if not arg.startswith(tuple(dashes)):
        return ""
    return f"{arg} begins with a typographic dash. Write --{arg.lstrip('-' + dashes)}."


def positive(number: type[int] | type[float]) -> Callable[[str], float]:
    """Returns the `type` of a flag whose value must be a positive, finite number.

    Args:
        number: int or float.
    """
    kind = "integer" if number is int else "number"
    return _checked(number, lambda value: 0 < value < math.inf, f"a positive {kind}")


def bounded(number: type, least: float, most: float) -> Callable[[str], float]:
    """Returns the `type` of a flag whose value must be a number from `least` to `most`.

    Args:
        number: int or float.
    """
    kind = "an integer" if number is int else "a number"
    words = f"{kind} from {least:.10g} to {most:.10g}"
    return _checked(number, lambda value: least <= value <= most, words)


def _checked(number, is_valid: Callable[[float], bool], words: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = number(text)
        except ValueError:
            value = math.nan
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"must be {words}; got {text}")
        return value

    return parse


def examples_first(doc: str | None) -> str:
    """Returns a docstring with its first indented block, the examples, moved to the top."""
    blocks = (doc or "").strip("\n").split("\n\n")
    index = next((i for i, block in enumerate(blocks) if block.startswith(" ")), None)
    if index is None:
        return "\n\n".join(blocks)
    examples = blocks.pop(index)
    indent = examples[: len(examples) - len(examples.lstrip(" "))]
    lines = [f"  {line.removeprefix(indent)}".rstrip() for line in examples.split("\n")]
    return "\n\n".join(["\n".join(["Examples:", *lines]), *blocks])


class Parser(argparse.ArgumentParser):
    """The ArgumentParser of a command.

    Args:
        prog: what the user typed to start the command.
        doc: the help text: a sentence, an indented block of examples, and the rest.
    """

    def __init__(self, prog: str, doc: str | None = "", **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, allow_abbrev=False, **options)
        self.doc = doc

    def format_help(self) -> str:
        doc = examples_first(self.doc)
        return f"{doc}\n\n{super().format_help()}" if doc else super().format_help()

    def print_help(self, file=None) -> None:
        if file is None:
            print_text(self.format_help().rstrip())
        else:
            super().print_help(file)

    def _flags(self) -> dict[str, str]:
        """Returns {flag without dashes: flag} of this parser and of its subcommands."""
        flags = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for parser in action.choices.values() for flag in parser._flags()]
        return {flag.lstrip("-"): flag for flag in flags}

    def parse_known_args(self, args=None, namespace=None):
        """Parses as argparse does, but checks first that all flags exist.

        argparse would report a misspelt required flag as missing.
        """
        args = sys.argv[1:] if args is None else list(args)
        known = self._flags()
        for arg in args[: args.index("--")] if "--" in args else args:
            name = arg.lstrip("-").partition("=")[0]
            if wrong := wrong_dash_error(arg):
                self.error(wrong)
            if re.match("--?[A-Za-z]", arg) and name not in known:
                self.error(unknown_flag_error(name, [k for k in known if k not in ("h", "help")]))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2 and one line."""
        message = re.sub(r"^argument ", "", message)
        required = "the following arguments are required: "
        if message.startswith(required):
            message = f"{message.removeprefix(required)} must be given"
        end = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"error: {message}{end} See {self.prog} --help.\n")
