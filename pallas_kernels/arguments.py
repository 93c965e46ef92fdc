"""An argparse parser whose errors are one line and whose help starts with examples.

pallas_kernels/arguments.py and launch/arguments.py are the same file, as neither package imports
the other; a test compares them.
"""

import argparse
import difflib
import os
import re
import sys


def print_text(text: str) -> None:
    """Prints a long text; a reader that closes the pipe, such as `head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit


def nearest_name(name: str, known) -> str:
    """Returns the known name that the user most likely meant; "" where none is near.

    The last part of a dotted name counts as the name: `batch` is near to `data.batch`.
    """
    same = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    same += [other for other in known if other.startswith(f"{name}.")]
    return next(iter(same or difflib.get_close_matches(name, known, 1)), "")


def unknown_flag_error(name: str, known) -> str:
    """Returns the error for a flag that a command does not have."""
    near = nearest_name(name, list(known))
    return f"no flag --{name}." + (f" Did you mean --{near}?" if near else "")


def wrong_dash_error(arg: str) -> str:
    """Returns the error for a flag whose dash is a typographic one; "" for other arguments."""
    dashes = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
    if not arg.startswith(tuple(dashes)):
        return ""
    return f"{arg} begins with a dash that is not '--'. Write --{arg.lstrip('-' + dashes)}."


def examples_first(doc: str) -> str:
    """Returns a docstring with its first indented block, the examples, moved to the top."""
    blocks = doc.strip("\n").split("\n\n")
    at = next((i for i, block in enumerate(blocks) if block.startswith(" ")), None)
    if at is None:
        return doc.strip("\n")
    indent = re.match(" *", blocks[at])[0]
    lines = [f"  {line.removeprefix(indent)}".rstrip() for line in blocks.pop(at).split("\n")]
    return "\n\n".join(["\n".join(["Examples:", *lines]), *blocks])


class Parser(argparse.ArgumentParser):
    """An ArgumentParser of a command.

    Args:
        prog: what the user typed to start the command.
        doc: the help: a sentence, an indented block of examples, and the rest.
    """

    def __init__(self, prog: str, doc: str = "", **options):
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

    def _flags(self) -> dict:
        """{flag without dashes: itself} of this parser and of its subcommands."""
        found = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [flag for parser in action.choices.values() for flag in parser._flags()]
        return {option.lstrip("-"): option for option in found}

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does, but an unknown flag comes before what is missing because of it."""
        args = sys.argv[1:] if args is None else list(args)
        known = self._flags()
        for arg in args[: args.index("--")] if "--" in args else args:
            name = arg.lstrip("-").partition("=")[0]
            if wrong := wrong_dash_error(arg):
                self.error(wrong)
            if re.match("--?[A-Za-z]", arg) and name not in known:
                self.error(unknown_flag_error(name, [k for k in known if k not in ("h", "help")]))
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        """Ends the program with status 2 and one line."""
        message = re.sub(r"^argument ", "", message)
        required = "the following arguments are required: "
        if message.startswith(required):
            message = f"{message.removeprefix(required)} must be given"
        end = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"error: {message}{end} See {self.prog} --help.\n")
