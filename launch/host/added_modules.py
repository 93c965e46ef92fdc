"""Finds modules that were added to the code on a host and that Python would import."""

import collections
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

PACKAGE_FILES = ("__init__.py", "__init__.pyc")


def find_added_modules(folder: Path, files: Iterable[str]) -> list[str]:
    """Returns the files in the code's folder that change what a program imports.

    The folder comes first in Python's search path, so that `numpy.py` there replaces the package.
    Two kinds of files may be what the code itself builds, and count only if they replace a module:
    in one of the code's packages, any file, if it replaces a module of the code; elsewhere an
    extension, such as a library for ctypes, if it replaces any known module. Folders without code
    (runs, data, caches, environments) are not searched, nor .pth files, which Python reads only in
    site-packages.

    Args:
        files: the code's files, relative to the folder.
    """
    sent, modules, names = set(files), collections.defaultdict(set), collections.defaultdict(set)
    searched = {""}  # the folders above modules
    for file in sent:
        parent, _, name = file.rpartition("/")
        module = _module(name)
        if module:
            modules[parent].add(module)
        path = file
        while path:  # each folder is a module of the one above it, too
            above, _, name = path.rpartition("/")
            names[above].add(name)
            if module:
                searched.add(above)
            path = above
    return sorted(
        path
        for parent in searched
        for name, path in _modules_in(folder, parent, names[parent])
        if path not in sent and _is_imported(name, path, modules[parent], names[parent])
    )


def _module(file_name: str) -> str:
    """Returns the name of the module that a file is; "" if it is none."""
    stem, _, rest = file_name.partition(".")
    is_module = rest in ("py", "pyc", "so") or rest.endswith(".so")  # x.cpython-311-aarch64.so
    return stem if is_module and stem.isidentifier() else ""


def _modules_in(folder: Path, parent: str, own_names: set[str]) -> Iterable[tuple[str, str]]:
    """Yields (name, path relative to the folder) of each module and package in `parent`."""
    for entry in os.scandir(folder / parent):
        path = f"{parent}/{entry.name}" if parent else entry.name
        if entry.is_file():
            if module := _module(entry.name):
                yield module, path
        elif entry.name.isidentifier() and entry.name not in own_names:
            for name in PACKAGE_FILES:
                if os.path.exists(f"{entry.path}/{name}"):
                    yield entry.name, f"{path}/{name}"


def _is_imported(name: str, path: str, own: set[str], own_names: set[str]) -> bool:
    if name in own or name in own_names or name == "__init__":
        return True
    if "__init__" in own:  # a package
        return False
    return not path.endswith(".so") or _is_known(name)


def _is_known(name: str) -> bool:
    try:
        return name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None
    except ValueError:  # it is loaded, without a specification
        return True
