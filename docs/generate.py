"""Writes the generated parts of the documentation.

    python docs/generate.py            writes them
    python docs/generate.py --check    exits with status 1 where one is out of date

Generated: commands.md and configuration.md, the table of layers in architecture.md, the table of
targets in kernels.md, and the notebooks (from the .py files beside them).
"""

import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path

os.environ["COLUMNS"] = "100"  # the width of help texts
os.environ.setdefault("JAX_PLATFORMS", "cpu")
DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import jupytext  # noqa: E402
from absl import flags  # noqa: E402

from jaxtrain.config.commands import COMMANDS, GROUPS  # noqa: E402
from jaxtrain.config.fields import list_sections, plain_fields  # noqa: E402
from jaxtrain.config.train_config import TrainConfig  # noqa: E402
from pallas_kernels.chip import find_chip  # noqa: E402
from pallas_kernels.contests import build_contests  # noqa: E402
from pallas_kernels.targets import read_targets  # noqa: E402

NOTEBOOKS = ("gpt_on_one_screen", "compare_optimizers", "use_optimizers")
NOTE = "<!-- Written by docs/generate.py. -->\n\n"
LAYERS_START, LAYERS_END = "<!-- layers: docs/generate.py -->\n", "<!-- end of layers -->\n"
TARGETS_START, TARGETS_END = "<!-- targets: docs/generate.py -->\n", "<!-- end of targets -->\n"


def help_text(command) -> str:
    """Returns what `jaxtrain NAME --help` prints."""
    module = importlib.import_module(command.module)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{command.module}.__main__")
    prog = "jaxtrain" if command.words else f"jaxtrain {command.name}"
    before, text = set(flags.FLAGS), io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        getattr(module, command.function)([*command.words, "--help"], prog=prog)
    for name in set(flags.FLAGS) - before:  # absl's flags are global
        delattr(flags.FLAGS, name)
    text.seek(0)
    return text.read().strip()


def commands() -> str:
    """Returns commands.md: the help text of every command."""
    parts = [
        "# Commands\n\n" + NOTE + "Every command is also a module: `jaxtrain train` is "
        "`python -m jaxtrain.train`. `jaxtrain COMMAND --help` prints the text below.\n"
    ]
    for group, title in GROUPS.items():
        parts.append(f"## {title}\n")
        for command in COMMANDS:
            if command.group == group:
                # The fields of a config have a page of their own.
                text = help_text(command).partition("\nFields of the config")[0].rstrip()
                parts.append(f"### jaxtrain {command.name}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def configuration() -> str:
    """Returns configuration.md: every field of a TrainConfig."""
    parts = [
        "# Configuration\n\n" + NOTE + "A config file in `configs/` sets values; a flag overrides "
        "one: `--optim.learning_rate=0.01`. An unknown name is an error that names the nearest.\n"
    ]
    for prefix, section in list_sections(TrainConfig):
        parts.append(f"## {prefix.rstrip('.') or 'Run'}\n")
        parts.append("| field | default | meaning |\n|---|---|---|")
        for field in plain_fields(section):
            meta = field.metadata
            text = meta["text"].replace("|", "\\|")
            unit = f" [{meta['unit']}]" if meta.get("unit") else ""
            choices = meta.get("choices")
            allowed = f" One of {', '.join(f'`{c}`' for c in choices)}." if choices else ""
            parts.append(
                f"| `{prefix}{field.name}` | `{field.default!r}` | {text}{unit}.{allowed} |"
            )
        parts.append("")
    return "\n".join(parts)


def layers() -> str:
    """Returns the list of layers that tests/test_layering.py enforces."""
    source = (DOCS.parent / "tests" / "test_layering.py").read_text()
    lines = re.search(r'LAYERS = """\n(.*?)"""', source, re.S)[1].strip().split("\n")
    rows = [
        f"| {i} | {', '.join(f'`{name}`' for name in lines[i].split())} |"
        for i in range(len(lines))
    ]
    return "\n".join(["| layer | modules and folders of `jaxtrain/` |", "|---|---|", *rows, ""])


def targets() -> str:
    """Returns the table of pallas_kernels/targets.json, with a column for each chip."""
    chips = read_targets()
    rows = [
        f"| contest of bench | {' | '.join(find_chip(name).kind for name in chips)} |",
        "|---" * (1 + len(chips)) + "|",
    ]
    for contest in build_contests():
        times = [chip.get(contest.name) for chip in chips.values()]
        if any(times):
            flops = contest.flops
            cells = [f"{time.body} {time.describe(flops)}" if time else "-" for time in times]
            rows.append(f"| {contest.name} | {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


def insert(page: str, start: str, end: str, table: str) -> str:
    """Returns a page with its part between two marks replaced by a table."""
    before, rest = (DOCS / page).read_text().split(start)
    return f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"


def notebook(name: str) -> str:
    """Returns a notebook, without outputs, from its Python file."""
    book = jupytext.read(DOCS / f"{name}.py")
    for number, cell in enumerate(book.cells):
        cell["id"] = f"{name}-{number}"  # jupytext draws random ones
    return jupytext.writes(book, fmt="ipynb")


def main() -> int:
    pages = {"commands.md": commands(), "configuration.md": configuration()}
    pages["architecture.md"] = insert("architecture.md", LAYERS_START, LAYERS_END, layers())
    pages["kernels.md"] = insert("kernels.md", TARGETS_START, TARGETS_END, targets())
    pages |= {f"{name}.ipynb": notebook(name) for name in NOTEBOOKS}
    stale = [
        name
        for name, text in pages.items()
        if not (DOCS / name).exists() or (DOCS / name).read_text() != text
    ]
    if "--check" in sys.argv:
        print(
            "\n".join(f"docs/{name} is out of date: run python docs/generate.py" for name in stale)
        )
        return 1 if stale else 0
    for name in stale:
        (DOCS / name).write_text(pages[name])
        print(f"wrote docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
