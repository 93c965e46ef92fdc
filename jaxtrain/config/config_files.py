"""The configs that are installed beside jaxtrain, and how a config is found by its name.

`quickstart`, `configs/quickstart.py` and `./mine.py` all name a config, from any folder. A file of
the user's comes first where the name has a path separator or ends in `.py`.
"""

import ast
import difflib
import importlib.util
import os
import sys
import textwrap
from pathlib import Path

from jaxtrain.config.commands import BY_NAME, COMMANDS

FOLDER = Path(__file__).resolve().parents[2] / "configs"


def shipped_configs(command: str = "") -> dict[str, str]:
    """Returns {name: first line of its docstring} of the configs that can be started.

    Args:
        command: only those that are for this command, such as "study"; empty is all.
    """
    wanted, found = [BY_NAME[command]] if command else COMMANDS, {}
    for path in sorted(FOLDER.glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if any(f"{c.long_form} " in doc or f"jaxtrain {c.name} " in doc for c in wanted):
            found[path.stem] = doc.splitlines()[0]
    return found


def format_listing(command: str, prog: str) -> str:
    """Returns the shipped configs with a line each, and the command that starts the first.

    Args:
        command: that takes the config, such as "train".
        prog: what the user typed to start it.
    """
    configs = shipped_configs(command) or shipped_configs("train")
    width = max(map(len, configs), default=0)
    lines = [f"  {name:<{width}}  {text}" for name, text in sorted(configs.items(), key=_order)]
    first = min(configs.items(), key=_order, default=("mine.py",))[0]
    return "\n".join(
        [
            "configs:",
            *lines,
            f"start one:        {prog} {first}",
            f"a file of yours:  {prog} ./mine.py",
        ]
    )


def _order(entry):
    name, _ = entry
    return name != "quickstart", name != "debug", name != "study_quick", name


def find_config(name: str) -> Path:
    """Returns the file of a config, by its path or by a shipped config's name.

    Raises:
        ValueError: there is none; the nearest name is suggested.
    """
    path = Path(name).expanduser()
    is_path = os.sep in name or name.endswith(".py")
    if is_path and path.is_file():
        return path
    inside = not path.is_absolute() and path.parent in (Path(), Path("configs"))
    if inside and (ours := FOLDER / f"{path.name.removesuffix('.py')}.py").is_file():
        if ours.stem != "__init__":
            return ours
    if is_path and path.is_dir():
        raise ValueError(f"a config must be a file; got the folder {name}.")
    hint = ""
    if not is_path and Path(f"{name}.py").is_file():
        hint = f" Did you mean ./{name}.py?"
    elif near := difflib.get_close_matches(path.stem, shipped_configs(), 1, cutoff=0.5):
        hint = f" Did you mean {near[0]}?"
    absent = ", and there is no such file" if is_path else ""
    raise ValueError(f"no config is called {name}{absent}.{hint}")


def _import_package(beside: Path) -> None:
    """Makes `from configs import base` mean our package, whatever folder the user is in.

    Args:
        beside: the config's folder; its own modules come first if it is called configs too.
    """
    package = sys.modules.get("configs")
    if package is None or not hasattr(package, "__path__"):
        spec = importlib.util.spec_from_file_location(
            "configs", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        package = sys.modules["configs"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    theirs = [str(beside)] if beside.name == "configs" and beside != FOLDER else []
    package.__path__ = [*theirs, str(FOLDER)]


def load_config_file(name: str):
    """Returns (what get_config() returns, the file) of a config.

    Args:
        name: as `find` takes it; `NAME:ARGUMENT` calls get_config(ARGUMENT).

    Raises:
        ValueError: there is no such config, or the file does not give one.
    """
    name, colon, argument = (name, "", "") if Path(name).is_file() else name.partition(":")
    path = find_config(name).resolve()
    _import_package(path.parent)
    spec = importlib.util.spec_from_file_location("_config_file", path)
    if spec is None:
        raise ValueError(f"a config must be a Python file; got {name}.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*([argument] if colon else []))
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise ValueError(_fault(name, path, error)) from error
    if not hasattr(config, "lock"):
        raise ValueError(f"{name}: get_config() must return a ConfigDict; got {config!r}.")
    config.lock()
    return config, path


def _fault(name, path, error) -> str:
    """One line for an exception in a config file, with the line in that file."""
    trace, lines = error.__traceback__, []
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [error.lineno]
    at = f", line {lines[-1]}" if lines else ""
    first = textwrap.shorten(str(error).replace("\n", " "), 200)
    return f"{name}{at}: a config must define get_config(); got {type(error).__name__}: {first}"
