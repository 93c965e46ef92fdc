"""The tables of flags in a command's help, as wide as the terminal."""

import re
import shutil
import textwrap

from absl import flags

WIDTH = 100  # where the help is not for a terminal


def wrap_table(table: str) -> str:
    """Wraps the lines of a table of flags to the terminal's width, below their text."""
    width = max(shutil.get_terminal_size((WIDTH + 1, 24)).columns - 1, 40)
    lines = []
    for line in table.splitlines():
        head = re.match(r"  \S+ +", line)
        if head and len(line) > width and len(head[0]) > width // 2:  # the text has its own lines
            lines.append(head[0].rstrip())
            line, indent = " " * 6 + line[len(head[0]) :], 6
        else:
            indent = len(head[0]) if head else 0
        below = {"subsequent_indent": " " * indent, "break_on_hyphens": False}
        lines += textwrap.wrap(line, width, break_long_words=False, **below) or [""]
    return "\n".join(lines)


def format_flag(name: str) -> str:
    """A flag's line in the help: `  --step=0    checkpoint to evaluate`."""
    flag = flags.FLAGS[name]
    default = flag.default
    shown = ",".join(map(str, default)) if isinstance(default, list) else default
    head = (
        f"--[no]{name}" if flag.boolean else f"--{name}={'...' if shown in ('', None) else shown}"
    )
    # absl puts an enum's values before the text, and behind it that a flag may be repeated.
    text = re.sub(r"^<[^>]*>: ", "", flag.help.partition(";\n")[0])
    if values := getattr(flag.parser, "enum_values", None):
        text += f". One of {', '.join(values)}."
    return f"  {head:<30} {text}"


OTHER_NAMES = {  # of fields, in other stacks
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
    """Returns the name of a field in this project for the name that it has in other stacks."""
    *sections, last = typed.split(".")
    return ".".join([*sections, OTHER_NAMES.get(last, last)])
