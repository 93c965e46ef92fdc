"""Formats the tables of flags in a command's help to the width of the terminal."""

import re
import shutil
import textwrap

from absl import flags

from jaxtrain.config.fields import list_sections, plain_fields

WIDTH = 100  # of the help if it is not printed to a terminal


def wrap_table(table: str) -> str:
    """Wraps each line of a table of flags to the terminal's width, indented to its text."""
    width = max(shutil.get_terminal_size((WIDTH + 1, 24)).columns - 1, 40)
    lines = []
    for line in table.splitlines():
        flag = re.match(r"  \S+ +", line)
        indent = len(flag[0]) if flag else 0
        if flag and len(line) > width and len(flag[0]) > width // 2:
            # The flag leaves too little room for its text, which starts on the next line.
            indent = 6
            lines.append(flag[0].rstrip())
            line = " " * indent + line[len(flag[0]) :]
        wrapped = textwrap.wrap(
            line,
            width,
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
            break_long_words=False,
        )
        lines += wrapped or [""]
    return "\n".join(lines)


def format_flag(name: str) -> str:
    """Returns the line of one of absl's flags: `  --step=0    checkpoint to evaluate`."""
    flag = flags.FLAGS[name]
    default = ",".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
    shown = "..." if default in ("", None) else default
    head = f"--[no]{name}" if flag.boolean else f"--{name}={shown}"
    # absl adds to the text: an enum's values before it, and "repeat this option" after it.
    text = re.sub(r"^<[^>]*>: ", "", (flag.help or "").partition(";\n")[0])
    if values := getattr(flag.parser, "enum_values", None):
        text += f". One of {', '.join(values)}."
    return f"  {head:<30} {text}"


def describe_flags(cls: type) -> str:
    """Returns the table of a config's fields: flag and default, meaning, unit, choices."""
    lines = ["Fields of the config (set with --NAME=VALUE, or --config.NAME=VALUE):", ""]
    for prefix, section in list_sections(cls):
        for f in plain_fields(section):
            meta = f.metadata
            allowed = f" One of {', '.join(meta['choices'])}." if meta["choices"] else ""
            unit = f" [{meta['unit']}]" if meta["unit"] else ""
            name = f"{prefix}{f.name}={f.default!r}"
            lines.append(f"  {name:<40} {meta['text']}{unit}.{allowed}")
        lines.append("")
    return "\n".join(lines)


OTHER_NAMES = {  # name in other training stacks -> name here
    "lr": "learning_rate",
    "wd": "weight_decay",
    "batch_size": "batch",
    "max_steps": "steps",
    "num_steps": "steps",
    "block_size": "seq_len",
    "n_layer": "L",
    "n_embd": "D",
    "n_head": "H",
    "output_dir": "workdir",
}


def translate_name(typed: str) -> str:
    """Returns the field's name here, if `typed` is its name in another training stack."""
    *sections, last = typed.split(".")
    return ".".join([*sections, OTHER_NAMES.get(last, last)])
