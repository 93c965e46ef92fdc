"""Reads command lines: the name of a config, flags that set its fields, the command's own flags.

Every field of the config is a flag (`--optim.learning_rate=0.01`), which may start with `config.`.
A flag of the command takes precedence over a field of the same name. Every error is one line that
names the flag that the user typed; the configs are listed below it if no known config was named.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

from absl import flags
from ml_collections import ConfigDict

from jaxtrain.config import config_files
from jaxtrain.config.commands import rewrite_commands
from jaxtrain.config.fields import default_of, find_fault, list_sections, plain_fields
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

HELP_FLAG = r"-+(help|helpshort|helpfull|h|\?)(=.*)?"
PARSERS: dict[type, Callable[[str], Any]] = {float: float, str: str}
PARSERS |= {bool: flags.BooleanParser().parse, int: flags.IntegerParser().parse}
TYPES = {int: "a whole number", float: "a number", bool: "true or false", tuple: "values as 1,2,3"}


class CommandForm(NamedTuple):
    """What the command line of a command may contain.

    Attributes:
        name: the command's name, such as "train".
        doc: its help text: a sentence, an indented block of examples, and the rest.
        define: defines the command's own flags.
        config: "" if it takes no config, "may" if a config is optional, "must" if it is required.
        default: builds the config if none is named, from {field: text} of the fields that are set.
        sections: (prefix, dataclass) of the config's fields.
        open_fields: prefixes below which a field need not be in `sections`.
        tables: text for the end of the help.
        status: exit status after a bad command line.
        words: how many arguments it takes besides flags and the config.
    """

    name: str
    doc: str | None
    define: Callable[[], None] = lambda: None
    config: str = ""
    default: Callable[[dict[str, str]], ConfigDict] | None = None
    sections: tuple = tuple(list_sections(TrainConfig))
    open_fields: tuple[str, ...] = ()
    tables: str = ""
    status: int = REFUSED
    words: int = 0


class Field(NamedTuple):
    """A config field that the user set."""

    name: str  # such as "optim.learning_rate"
    value: str
    typed: str  # the flag as the user typed it, without dashes


class _CommandLine:
    """Reads one command line with `read`, and ends the program if it is invalid."""

    def __init__(self, form: CommandForm, prog: str):
        before = set(flags.FLAGS)
        form.define()
        if form.config:
            flags.DEFINE_string("config", None, "name of a shipped config, or path of your own")
        self.form, self.prog = form, prog
        self.own = [name for name in flags.FLAGS if name not in before]
        pairs = form.sections if form.config else ()  # (prefix, dataclass)
        self.fields = {prefix + f.name: f for prefix, cls in pairs for f in plain_fields(cls)}
        self.given: list[tuple[str, str]] = []  # the command's own flags and their values
        self.overrides: list[Field] = []
        self.words: list[str] = []
        self.config_name = ""

    def refuse(self, reason: str) -> NoReturn:
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(self.form.status)

    def read(self, argv: list[str]) -> list[str]:
        """Sets absl's FLAGS and returns the words that are not flags or the config's name."""
        if any(re.fullmatch(HELP_FLAG, arg) for arg in argv):
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
            self.refuse(f"{self.prog} takes only flags; got {extra}. Write --{name}={extra}.")
        try:
            flags.FLAGS([self.prog, *(f"--{name}={value}" for name, value in self.given)])
        except flags.Error as error:
            if missing := re.match(r"flag --(\w+)=None", str(error)):
                text = flags.FLAGS[missing[1]].help
                self.refuse(f"--{missing[1]} must be given: {text}. See {self.prog} --help.")
            self.refuse(" ".join(str(error).split()))
        if self.config_name or self.form.default:
            self._load_config()
        return self.words

    def _split(self, args: Iterable[str]) -> None:
        """Sorts the arguments into the command's own flags, the config's fields, and words."""
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
            name, kind, is_bool, negated = self._find_flag(typed)
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

    def _find_flag(self, typed: str) -> tuple[str, str, bool, bool]:
        """Finds the flag that the user means by --typed.

        Returns:
            Its name; "own" if it is the command's or absl's, "field" if it is the config's; whether
            it is a bool; and whether it was typed with the prefix `no`, which sets a bool to false.
        """
        if found := self._find_exactly(typed):
            return *found, False
        if typed.startswith("no") and (found := self._find_exactly(typed[2:])) and found[2]:
            return *found, True
        own = [name for name in self.own if name != "config"]
        if typed.startswith("config."):
            own, known = [], [f"config.{field}" for field in self.fields]
        else:
            known = [*own, *self.fields]
        translated = translate_name(typed)
        text = unknown_flag_error(translated, known).replace(translated, typed, 1)
        self.refuse(f"{text} See {self.prog} --help.")

    def _find_exactly(self, name: str) -> tuple[str, str, bool] | None:
        field = name.removeprefix("config.")
        if name in self.own:
            return name, "own", flags.FLAGS[name].boolean
        if field in self.fields:
            return field, "field", self.fields[field].type is bool
        if self.fields and field.startswith(tuple(self.form.open_fields)):
            return field, "field", False
        if name in flags.FLAGS:  # absl's
            return name, "own", flags.FLAGS[name].boolean
        return None

    def _check_own(self) -> None:
        """Refuses an invalid value of a flag in one line; absl would print several."""
        for name, value in self.given:
            parser = flags.FLAGS[name].parser
            try:
                parser.parse(value)
            except (ValueError, TypeError, flags.Error):
                allowed = getattr(parser, "enum_values", None)
                expected = f"one of {', '.join(allowed)}" if allowed else parser.syntactic_help
                if flags.FLAGS[name].boolean:
                    expected = "true or false"
                self.refuse(f"--{name} must be {expected or 'valid'}; got {value!r}.")

    def _take_config(self) -> None:
        """Takes the config's name from --config or from the words."""
        named = [value for name, value in self.given if name == "config"]
        if len(self.words) > self.form.words:
            named += self.words
            self.words = []
        if len(named) > 1:
            names = ", ".join(named)
            self.refuse(f"{self.prog} takes one config; got {names}. Set fields by --NAME=VALUE.")
        self.given = [(name, value) for name, value in self.given if name != "config"]
        self.config_name = named[0] if named else ""
        is_needed = self.form.config == "must" or (self.overrides and not self.form.default)
        if is_needed and not self.config_name:
            listing = config_files.format_listing(self.form.name, self.prog)
            self.refuse(f"{self.prog} needs a config.\n{listing}")

    def _load_config(self) -> None:
        """Sets FLAGS.config to the ConfigDict, including the fields that the user set."""
        try:
            if self.form.default and not self.config_name:
                config, path = self.form.default({f.name: f.value for f in self.overrides}), ""
            else:
                config, path = config_files.load_config_file(self.config_name)
        except ValueError as error:
            is_unknown = str(error).startswith("no config")
            listing = config_files.format_listing(self.form.name, self.prog) if is_unknown else ""
            self.refuse(f"{error}\n{listing}".strip())
        self._check_names(config)
        for field in self.overrides:
            self._override(config, field)
        flags.FLAGS["config"].value = config
        # The config flag of ml_collections has this attribute too; jaxtrain.plan reads it.
        setattr(flags.FLAGS["config"], "config_filename", str(path))  # noqa: B010

    def _check_names(self, config: ConfigDict) -> None:
        """Refuses a config file that sets a field which TrainConfig does not have."""
        if "model" not in config:  # a study's config, or another command's
            return
        for name in sorted(set(config) - {known.partition(".")[0] for known in self.fields}):
            near = nearest_name(name, list(self.fields))
            hint = near and f" Did you mean {near}?"
            self.refuse(f"{self.config_name}: config has no field {name}.{hint}")

    def _override(self, config: ConfigDict, field: Field) -> None:
        """Sets one field in a ConfigDict, checked by its type and its own bounds."""
        name, knob = field.name, self.fields.get(field.name)
        if "base" in config and knob and not name.startswith(("base.", "study.")):
            name = f"base.{name}"  # the config that all runs of a study start from
        *sections, last = name.split(".")
        inner: Any = config
        for section in sections:
            inner = inner[section] if section in inner else {}
        if knob and inner and last not in inner:
            with inner.unlocked():
                inner[last] = default_of(knob)  # a study's config may leave it out
        if last not in inner:
            near = nearest_name(name, list(_names(config)))
            hint = near and f" Did you mean --{near}?"
            self.refuse(f"{self.config_name} has no field {name} for --{field.typed}.{hint}")
        value = self._parse_value(field, type(inner[last]))
        if knob and (reason := find_fault(knob, value)):
            self.refuse(f"{field.name} {reason}; got {value!r}. Set --{field.typed}.")
        try:
            inner[last] = value
        except (TypeError, ValueError) as error:
            self.refuse(f"--{field.typed}: {' '.join(str(error).split())}")

    def _parse_value(self, field: Field, kind: type) -> Any:
        """Returns the value of a field as a `kind`, the type of the config's own value."""
        text = field.value
        try:
            if kind in PARSERS:
                return PARSERS[kind](text)
            value = ast.literal_eval(text)
            return (value,) if kind is tuple and not isinstance(value, tuple) else value
        except (ValueError, SyntaxError, TypeError):
            expected = TYPES.get(kind, "a Python literal")
            self.refuse(f"{field.name} must be {expected}; got {text!r}. Set --{field.typed}.")

    def help(self) -> str:
        """Returns the help: examples, what the command does, its flags, and the config's fields."""
        own = "\n".join(["Flags:", *map(format_flag, self.own)]) if self.own else ""
        tables = [table for table in (own, self.form.tables.strip("\n")) if table]
        doc = rewrite_commands(examples_first(self.form.doc), self.prog)
        return "\n\n".join([doc, *(wrap_table(rewrite_commands(t, self.prog)) for t in tables)])


def _names(config: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of a ConfigDict's leaves."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def parse(form: CommandForm, prog: str, argv: list[str]) -> list[str]:
    """Reads the arguments of a command into absl's FLAGS; returns the words that are not flags.

    `prog` is what the user typed to start the command. FLAGS.config is the ConfigDict, including
    the fields that the user set. Help and bad input end the program.
    """
    words = _CommandLine(form, prog).read(argv)
    # absl checks this flag in its app.run, but only the first time in a process.
    if "only_check_args" in flags.FLAGS and flags.FLAGS.only_check_args:
        sys.exit(0)
    return words
