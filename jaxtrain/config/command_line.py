"""Command lines of the commands whose flags are absl's: config names, bare fields, help, errors.

A field of a config is a flag as it stands (`--optim.learning_rate=0.01`) or after `--config.`; the
command's own flag comes first where both have one name. Every error is one line, and names the flag
that the user typed.
"""

import ast
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

from absl import flags

from jaxtrain.config import config_files
from jaxtrain.config.commands import rewrite_commands
from jaxtrain.config.fields import find_fault, list_sections, plain_fields
from jaxtrain.config.help_text import format_flag, translate_name, wrap_table
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.errors import REFUSED
from pallas_kernels.arguments import (
    examples_first,
    nearest_name,
    print_text,
    unknown_flag_error,
    wrong_dash_error,
)

ASKS_HELP = ("help", "helpshort", "helpfull", "h", "?")
TYPES = {int: "a whole number", float: "a number", bool: "true or false", tuple: "values as 1,2,3"}


class CommandForm(NamedTuple):
    """What a command's line may hold.

    Args:
        name: of the command, as "train".
        doc: its help: a sentence, an indented block of examples, and the rest.
        define: defines its own flags.
        config: "" takes no config, "may" takes one, "must" needs one.
        sections: (prefix, dataclass) of the config's fields.
        open_fields: prefixes below which any field may stand.
        tables: text at the end of the help.
        status: of the process after a bad command line.
        words: how many words it takes beside the config.
    """

    name: str
    doc: str
    define: Callable[[], None] = lambda: None
    config: str = ""
    sections: tuple = tuple(list_sections(TrainConfig))
    open_fields: tuple[str, ...] = ()
    tables: str = ""
    status: int = REFUSED
    words: int = 0


class Field(NamedTuple):
    """A config field that the user gave."""

    name: str
    value: str
    typed: str  # the flag, without dashes


class _Line:
    """Reads one command line; `read` does it all."""

    def __init__(self, form: CommandForm, prog: str):
        before = set(flags.FLAGS)
        form.define()
        if form.config:
            flags.DEFINE_string("config", None, "a shipped config's name, or a file of yours")
        self.form, self.prog = form, prog
        self.own = [name for name in flags.FLAGS if name not in before]
        self.fields = {}
        if form.config:
            self.fields = {
                f"{prefix}{field.name}": field
                for prefix, cls in form.sections
                for field in plain_fields(cls)
            }
        self.given: list[tuple[str, str]] = []  # own flags
        self.overrides: list[Field] = []
        self.words: list[str] = []

    def refuse(self, reason: str):
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(self.form.status)

    def read(self, argv: list[str]) -> list[str]:
        """Sets absl's FLAGS; returns the words that are left."""
        if any(_flag_name(arg) in ASKS_HELP for arg in argv):
            print_text(self.help())
            sys.exit(0)
        try:
            self._split(flags.FLAGS.read_flags_from_files(argv, force_gnu=False))
        except flags.Error as error:  # a --flagfile that cannot be read
            self.refuse(str(error).splitlines()[0].removeprefix("ERROR:: "))
        self._check_own()
        if self.form.config:
            self._take_config()
        if len(self.words) > self.form.words:
            name = "run" if "run" in self.own else "NAME"
            extra = self.words[self.form.words]
            self.refuse(f"{self.prog} takes flags only; got {extra}. Write --{name}={extra}.")
        try:
            flags.FLAGS([self.prog, *(f"--{name}={value}" for name, value in self.given)])
        except flags.Error as error:
            self._explain(error)
        if self.form.config:
            self._load_config()
        return self.words

    def _split(self, args) -> None:
        """Sorts the arguments into own flags, fields and words."""
        args = list(args)
        while args:
            arg = args.pop(0)
            if arg == "--":
                self.words += args
                return
            if wrong := wrong_dash_error(arg):
                self.refuse(wrong)
            if not re.match(r"--?[A-Za-z_]", arg):
                self.words.append(arg)
                continue
            typed, equals, value = arg.lstrip("-").partition("=")
            name, kind, is_bool, negated = self._target(typed)
            if is_bool and not equals:
                value = "false" if negated else "true"
            elif negated:
                self.refuse(f"--{typed} takes no value; got {value!r}. Set --{name}={value}.")
            elif not equals:
                if not args or args[0].startswith("--"):
                    self.refuse(f"--{typed} needs a value. Write --{typed}=VALUE.")
                value = args.pop(0)
            if kind == "own":
                self.given.append((name, value))
            else:
                self.overrides.append(Field(name, value, name if negated else typed))

    def _target(self, typed: str) -> tuple[str, str, bool, bool]:
        """Returns (name, "own" or "field", whether it is a bool, whether it is `no` + a bool)."""
        for name, negated in ((typed, False), (re.sub("^no", "", typed), True)):
            if negated and name == typed:
                break
            if name in self.own:
                is_bool = flags.FLAGS[name].boolean
                if is_bool or not negated:
                    return name, "own", is_bool, negated
            field = name.removeprefix("config.")
            if field in self.fields:
                is_bool = self.fields[field].type is bool
                if is_bool or not negated:
                    return field, "field", is_bool, negated
            if not negated and self.fields and field.startswith(self.form.open_fields or "\0"):
                return field, "field", False, False
            if name in flags.FLAGS and (flags.FLAGS[name].boolean or not negated):  # absl's
                return name, "own", flags.FLAGS[name].boolean, negated
        own = [name for name in self.own if name != "config"]
        if typed.startswith("config."):
            own, known = [], [f"config.{field}" for field in self.fields]
        else:
            known = [*own, *self.fields]
        text = unknown_flag_error(translate_name(typed), known).replace(
            translate_name(typed), typed, 1
        )
        self.refuse(f"{text} See {self.prog} --help.")

    def _check_own(self) -> None:
        """A value that its flag cannot take ends the program, in words of ours."""
        for name, value in self.given:
            parser = flags.FLAGS[name].parser
            try:
                parser.parse(value)
            except (ValueError, TypeError, flags.Error):
                allowed = getattr(parser, "enum_values", None)
                what = f"one of {', '.join(allowed)}" if allowed else parser.syntactic_help
                what = "true or false" if flags.FLAGS[name].boolean else what
                self.refuse(f"--{name} must be {what or 'valid'}; got {value!r}.")

    def _explain(self, error) -> None:
        """Ends the program with absl's complaint about a flag in one line."""
        missing = re.match(r"flag --(\w+)=None", str(error))
        if not missing:
            self.refuse(" ".join(str(error).split()))
        name = missing[1]
        self.refuse(f"--{name} must be given: {flags.FLAGS[name].help}. See {self.prog} --help.")

    def _take_config(self) -> None:
        """Moves the config's name from the words to the flag."""
        named = [value for name, value in self.given if name == "config"]
        if self.words[self.form.words :] or (self.words and not named and not self.form.words):
            words, self.words = self.words, []
            named += words
        if len(named) > 1:
            self.refuse(f"one config; got {', '.join(named)}. Fields are set by --NAME=VALUE.")
        self.given = [(name, value) for name, value in self.given if name != "config"]
        self.named = named[0] if named else ""
        if not self.named and (self.form.config == "must" or self.overrides):
            listing = config_files.format_listing(self.form.name, self.prog)
            self.refuse(f"{self.prog} needs a config.\n{listing}")

    def _load_config(self) -> None:
        """Sets FLAGS.config to the ConfigDict, with the user's fields in it."""
        if not self.named:
            return
        try:
            config, path = config_files.load_config_file(self.named)
        except ValueError as error:
            listing = ""
            if str(error).startswith("no config"):
                listing = f"\n{config_files.format_listing(self.form.name, self.prog)}"
            self.refuse(f"{error}{listing}")
        self._check_names(config)
        for field in self.overrides:
            self._override(config, field)
        flags.FLAGS["config"].value = config
        flags.FLAGS["config"].config_filename = str(path)

    def _check_names(self, config) -> None:
        """Refuses a config file with a field that no TrainConfig has, and names the file."""
        if "model" not in config:  # a study's, or another command's
            return
        for name in config:
            if name not in {known.partition(".")[0] for known in self.fields}:
                near = nearest_name(name, list(self.fields))
                hint = f" Did you mean {near}?" if near else ""
                self.refuse(f"{self.named}: config has no field {name}.{hint}")

    def _override(self, config, field: Field) -> None:
        """Sets one field in a ConfigDict, checked by its type and its own bounds."""
        name = field.name
        if "base" in config and name in self.fields and not name.startswith(("base.", "study.")):
            name = f"base.{name}"  # a study's runs
        *sections, last = name.split(".")
        inner = config
        for section in sections:
            inner = inner[section] if section in inner else {}
        if last not in inner:
            near = nearest_name(name, list(_names(config)))
            hint = f" Did you mean --{near}?" if near else ""
            self.refuse(f"{self.named} has no field {name} for --{field.typed}.{hint}")
        value = self._value(field, inner[last])
        knob = self.fields.get(field.name)
        if knob is not None and (what := find_fault(knob, value)):
            self.refuse(f"{field.name} {what}; got {value!r}. Set --{field.typed}.")
        try:
            inner[last] = value
        except (TypeError, ValueError) as error:
            self.refuse(f"--{field.typed}: {' '.join(str(error).split())}")

    def _value(self, field: Field, old):
        """The typed value of a field, of the same type as the config's own."""
        kind, text = type(old), field.value
        try:
            if kind is bool:
                return flags.BooleanParser().parse(text)
            if kind is int:
                return flags.IntegerParser().parse(text)
            if kind is float:
                return float(text)
            if kind is str:
                return text
            value = ast.literal_eval(text)
            if kind is tuple:
                return value if isinstance(value, tuple) else (value,)
            return value
        except (ValueError, SyntaxError, TypeError):
            what = TYPES.get(kind, "a Python literal")
            self.refuse(f"{field.name} must be {what}; got {text!r}. Set --{field.typed}.")

    def help(self) -> str:
        """Examples, what the command does, its flags, and the config's fields."""
        own = ["Flags:\n" + "\n".join(map(format_flag, self.own))] if self.own else []
        tables = [self.form.tables.strip("\n")] if self.form.tables else []
        fitted = [wrap_table(rewrite_commands(table, self.prog)) for table in (*own, *tables)]
        return "\n\n".join([rewrite_commands(examples_first(self.form.doc), self.prog), *fitted])


def _flag_name(arg: str) -> str:
    return arg.lstrip("-").partition("=")[0] if arg.startswith("-") else ""


def _names(config, prefix=""):
    """Yields the dotted names of a ConfigDict's leaves."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def parse(form: CommandForm, prog: str, argv: list[str]) -> list[str]:
    """Reads a command line into absl's FLAGS and returns the words that are no flags.

    FLAGS.config is the ConfigDict with the user's fields. Help and bad input end the program.

    Args:
        prog: what the user typed to start the command.
        argv: the arguments behind it.
    """
    return _Line(form, prog).read(argv)
