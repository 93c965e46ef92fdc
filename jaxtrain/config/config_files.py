"""Finds a config by its name, and loads it; lists the configs that are installed with jaxtrain.

`quickstart`, `configs/quickstart.py` and `./mine.py` all name a config, from any folder. If the
name has a path separator or ends in `.py`, the user's file takes precedence over a shipped config.
The folder of a run also names a config: the one that is stored in the run's config.json.
"""

import ast
import difflib
import importlib.util
import json
import os
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from jaxtrain.config.commands import BY_NAME, COMMANDS
from jaxtrain.config.train_config import freeze, to_config_dict

FOLDER = Path(__file__).resolve().parents[2] / "configs"
RUN_CONFIG = "config.json"  # in a run's folder


def shipped_configs(command: str = "") -> dict[str, str]:
    """Returns {name: first line of its docstring} of the shipped configs.

    The command in a config's docstring shows which command the config is for.

    Args:
        command: lists only the configs for this command, such as "study"; empty lists all.
    """
    commands, found = [BY_NAME[command]] if command else COMMANDS, {}
    for path in sorted(FOLDER.glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if any(f"{c.long_form} " in doc or f"jaxtrain {c.name} " in doc for c in commands):
            found[path.stem] = doc.splitlines()[0]
    return found


def format_listing(command: str, prog: str) -> str:
    """Returns the list of shipped configs, one per line, and the command that starts the first.

    Args:
        command: the command that takes the config, such as "train".
        prog: what the user typed to start it.
    """
    if command == "branch":
        return f"It is the folder of a run: {prog} runs/quickstart --help shows the flags."
    configs = shipped_configs(command) or shipped_configs("train")
    first = ("quickstart", "debug", "study_quick")
    names = [name for name in first if name in configs]
    names += sorted(configs.keys() - set(first))
    width = max(map(len, names), default=0)
    return "\n".join(
        [
            "configs:",
            *(f"  {name:<{width}}  {configs[name]}" for name in names),
            f"to start one:     {prog} {names[0] if names else 'mine.py'}",
            f"your own file:    {prog} ./mine.py",
        ]
    )


def find_config(name: str) -> Path:
    """Returns the file of a config, given its path or the name of a shipped config.

    Raises:
        ValueError: there is no such config; the error names the nearest.
    """
    path = Path(name).expanduser()
    is_path = os.sep in name or name.endswith(".py")
    if is_path and path.is_file():
        return path
    shipped = FOLDER / f"{path.name.removesuffix('.py')}.py"
    names_shipped = not path.is_absolute() and path.parent in (Path(), Path("configs"))
    if names_shipped and shipped.is_file() and shipped.stem != "__init__":
        return shipped
    if is_path and path.is_dir():
        raise ValueError(
            f"a config must be a file, or a run's folder with {RUN_CONFIG}; got the folder {name}."
        )
    hint = ""
    if not is_path and Path(f"{name}.py").is_file():
        hint = f" Did you mean ./{name}.py?"
    elif near := difflib.get_close_matches(path.stem, shipped_configs(), 1, cutoff=0.5):
        hint = f" Did you mean {near[0]}?"
    absent = ", and there is no such file" if is_path else ""
    raise ValueError(f"no config is called {name}{absent}.{hint}")


def _load_module(name: str, path: Path, **options) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path, **options)
    if spec is None or spec.loader is None:
        raise ValueError(f"a config must be a Python file; got {path}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import_package(config_folder: Path) -> None:
    """Makes `from configs import base` find the shipped modules from any current folder.

    Args:
        config_folder: the folder of the config file; if it is also called "configs", its modules
            take precedence over the shipped ones.
    """
    package = sys.modules.get("configs")
    if package is None or not hasattr(package, "__path__"):
        package = _load_module(
            "configs", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        sys.modules["configs"] = package
    is_other = config_folder.name == "configs" and config_folder != FOLDER
    package.__path__ = [str(config_folder), str(FOLDER)] if is_other else [str(FOLDER)]


def find_run_folder(name: str) -> Path | None:
    """Returns the folder of the run that a config's name means; None if it means a config file.

    A shipped config takes precedence over a folder of the same name without a path separator.
    """
    path = Path(name).expanduser()
    if not name or not (path / RUN_CONFIG).is_file():
        return None
    is_shipped = os.sep not in name and (FOLDER / f"{name}.py").is_file()
    return None if is_shipped else path


def load_run_config(folder: Path) -> ConfigDict:
    """Returns the config in a run's config.json; its workdir is the folder.

    Raises:
        ValueError: the file is damaged, or a field or value in it is no longer allowed.
    """
    path = folder / RUN_CONFIG
    try:
        cfg = freeze(json.loads(path.read_bytes())["config"] | {"workdir": str(folder)})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must contain a run's config; got {error}.") from None
    config: Any = to_config_dict(cfg)
    if cfg.optim.total_steps != cfg.steps:  # else it goes on following --steps
        config.optim.total_steps = cfg.optim.total_steps
    config.lock()
    return config


def load_config_file(name: str) -> tuple[ConfigDict, Path]:
    """Runs a config file, and returns the result of its get_config() and the file's path.

    Args:
        name: as for `find_config`; `NAME:ARGUMENT` calls get_config(ARGUMENT). The folder of a run
            gives the run's config.

    Raises:
        ValueError: there is no such config, or its file fails.
    """
    if folder := find_run_folder(name):
        return load_run_config(folder), (folder / RUN_CONFIG).resolve()
    name, colon, argument = (name, "", "") if Path(name).is_file() else name.partition(":")
    path = find_config(name).resolve()
    _import_package(path.parent)
    try:
        module = _load_module("_config_file", path)
        config = module.get_config(*([argument] if colon else []))
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise ValueError(_describe_failure(name, path, error)) from error
    if not hasattr(config, "lock"):
        raise ValueError(f"{name}: get_config() must return a ConfigDict; got {config!r}.")
    config.lock()
    return config, path


def _describe_failure(name: str, path: Path, error: BaseException) -> str:
    """Returns one line for an exception in a config file, with the line number in that file."""
    trace, lines = error.__traceback__, []
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [error.lineno]
    where = f"{name}, line {lines[-1]}" if lines else name
    text = textwrap.shorten(str(error).replace("\n", " "), 200)
    return f"{where}: a config must define get_config(); got {type(error).__name__}: {text}"
