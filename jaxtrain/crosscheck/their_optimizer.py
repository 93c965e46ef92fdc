"""Loads somebody's PyTorch optimizer and maps its settings to ours."""

import ast
import functools
import importlib
import importlib.util
import itertools
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ml_collections import ConfigDict

from jaxtrain.config import config_files
from jaxtrain.config.sections import OptimConfig
from jaxtrain.optim.param_groups import ADAM_SIZED
from jaxtrain.reporting.table import format_table

SCALES = {"original": "spectral_max", None: "spectral_max", "match_rms_adamw": "match_rms"}
# A setting of an optimizer in torch -> our field of the same meaning.
FIELDS = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "momentum": "momentum",
    "nesterov": "nesterov",
    "ns_steps": "ns_steps",
    "adjust_lr_fn": "scale",
    "precondition_frequency": "precondition_every",
    "max_precond_dim": "precondition_max_side",
}
# optim.name -> fields of `betas`; these optimizers have `eps` too, which Muon means differently.
BETAS = {
    "adamw": ("adam_b1", "adam_b2"),
    "adam_h": ("adam_b1", "adam_b2"),
    "soap": ("momentum", "precondition_decay"),
}


class TheirOptimizer(NamedTuple):
    """A class of torch.optim's kind and the arguments that it is built with."""

    cls: type
    arguments: dict[str, Any]
    source: str  # as the user wrote it

    @property
    def name(self) -> str:
        return self.cls.__name__

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Builds the optimizer of these parameter groups.

        Raises:
            ValueError: its constructor fails, or what it builds is not like torch.optim's.
        """
        params = groups[0]["params"] if len(groups) == 1 and len(groups[0]) == 1 else groups
        try:
            optimizer = self.cls(params, **self.arguments)
        except Exception as error:
            given = ", ".join(f"{k}={v!r}" for k, v in self.arguments.items()) or "no arguments"
            raise ValueError(
                f"--theirs={self.source} must be built by {self.name}(params, ...); with {given} "
                f"it raises {type(error).__name__}: {error}. Set --arguments."
            ) from error
        found: Any = getattr(optimizer, "param_groups", None)
        valid = isinstance(found, list) and all(isinstance(group, dict) for group in found)
        if not valid or not found or any("lr" not in group for group in found):
            got = [sorted(group) for group in found] if valid else found
            raise ValueError(
                f"--theirs={self.source} must have param_groups, a list of dicts with `lr`, like "
                f"torch.optim's optimizers; got {got}."
            )
        return self._guard_steps(optimizer)

    def _guard_steps(self, optimizer: Any) -> torch.optim.Optimizer:
        """Makes the optimizer's `step` raise a ValueError where it fails or replaces a tensor."""
        step, counter = optimizer.step, itertools.count(1)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        kinds = [(p.shape, p.dtype) for p in params]

        def guarded_step() -> None:
            count = next(counter)
            try:
                step()
            except (Exception, SystemExit) as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                raise ValueError(
                    f"--theirs={self.source} must step parameters of {kinds[0][1]}; step {count} "
                    f"raises {type(error).__name__}: {error} ({place.filename}, line "
                    f"{place.lineno}). If it mixes in float32, set --precision=float32."
                ) from error
            if changed := [(p.shape, p.dtype) for p in params if (p.shape, p.dtype) not in kinds]:
                shape, dtype = changed[0]
                raise ValueError(
                    f"--theirs={self.source} must keep the shape and type of its parameters; after "
                    f"step {count} one is of {tuple(shape)} and {dtype}."
                )

        optimizer.step = guarded_step
        return optimizer

    def settings(self) -> dict[str, Any]:
        """Returns the settings of its parameter groups, defaults included."""
        probe = self.build([{"params": [torch.nn.Parameter(torch.zeros(2, 3))]}])
        return {k: v for k, v in probe.param_groups[0].items() if k != "params"}


def load_optimizer(source: str, arguments: str) -> TheirOptimizer:
    """Loads the class `FILE.py:Class` or `module:Class`.

    Args:
        arguments: of its constructor, as in `lr=0.02, betas=(0.9, 0.95)`; the values are literals
            or names in torch.

    Raises:
        ValueError: the class cannot be imported, or an argument is not readable.
    """
    where, _, name = source.rpartition(":")
    if not where or not name.isidentifier():
        raise ValueError(
            f"--theirs must be FILE.py:Class or module:Class; got {source!r}. "
            "Write --theirs=my_muon.py:Muon, for example."
        )
    if where.endswith(".py") and not Path(where).is_file():
        raise ValueError(f"--theirs must name an existing file; got {where}.")
    try:
        if where.endswith(".py"):
            module = _import_file(where, Path(where).stat().st_mtime_ns)
        else:
            module = importlib.import_module(where)
    except (Exception, SystemExit) as error:  # anything can happen while a user's file runs
        raise ValueError(
            f"--theirs={source} must be importable; {where} raises {type(error).__name__}: {error}."
        ) from error
    cls = getattr(module, name, None)
    if not isinstance(cls, type) or not callable(getattr(cls, "step", None)):
        found = [n for n, x in vars(module).items() if isinstance(x, type) and hasattr(x, "step")]
        raise ValueError(
            f"--theirs={source} must name a class with a method `step`; {where} has "
            f"{', '.join(found) or 'none'}."
        )
    return TheirOptimizer(cls, _parse_arguments(arguments), source)


@functools.cache  # a file may take long to import, or print
def _import_file(path: str, modified_ns: int) -> Any:
    """Imports a file as a module; its folder is on the path, so that it may import siblings.

    The module's name is not the file's, which may be that of another module, such as `random`.
    """
    file = Path(path).resolve()
    name = f"theirs_{file.stem}_{modified_ns}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


def _parse_arguments(text: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args  # keyword arguments only
        assert all(keyword.arg for keyword in call.keywords)  # no **arguments
        return {str(keyword.arg): _evaluate(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise ValueError(
            f"--arguments must be Python keyword arguments, values or torch.NAME; got {text!r}. "
            'Write --arguments="lr=0.02, betas=(0.9, 0.95)", for example.'
        ) from None


def _evaluate(node: ast.expr) -> Any:
    """Returns the value of a literal, or of a name in torch, such as `torch.float64`."""
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch":
        if hasattr(torch, node.attr):
            return getattr(torch, node.attr)
    return ast.literal_eval(node)


def _matching_fields(ours: str, settings: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yields (setting, our field, our value) for each setting that we have too."""
    for setting, value in settings.items():
        if setting == "betas" and ours in BETAS:
            for field, beta in zip(BETAS[ours], value, strict=True):
                yield setting, field, float(beta)
        elif setting == "eps" and ours in BETAS:
            yield setting, "adam_eps", float(value)
        elif setting == "lr" and ours in ADAM_SIZED:
            yield setting, "adam_learning_rate", float(value)
        elif setting == "adjust_lr_fn":
            yield setting, "scale", SCALES.get(value, "none")
        elif setting in FIELDS:
            kind = type(getattr(OptimConfig(), FIELDS[setting]))
            yield setting, FIELDS[setting], kind(value)


def build_default_config(theirs: TheirOptimizer, ours: str) -> ConfigDict:
    """Returns a small GPT-2's config with our optimizer and the settings of theirs.

    What theirs lacks is off: weight decay if it has none.
    """
    config, _ = config_files.load_config_file("crosscheck_gpt2")
    matching = _matching_fields(ours, theirs.settings())
    optim = {"name": ours, "weight_decay": 0.0} | {field: value for _, field, value in matching}
    config.update(workdir="runs/crosscheck_optimizer", optim=optim)
    return config


def settings_table(theirs: TheirOptimizer, cfg: OptimConfig) -> str:
    """Returns a table of their settings beside ours; those that differ are marked."""
    settings = theirs.settings()
    matching = {}
    for setting, field, value in _matching_fields(cfg.name, settings):
        got = getattr(cfg, field)
        mark = "" if got == value else "  <- differs"
        matching.setdefault(setting, []).append(f"optim.{field}={got}{mark}")
    rows = [(name, repr(settings[name]), " ".join(parts)) for name, parts in matching.items()]
    table = format_table(rows, ("setting", theirs.name, f"jaxtrain {cfg.name}"))
    others = [f"{name}={value!r}" for name, value in settings.items() if name not in matching]
    return f"{table}\nnot compared: {', '.join(others)}" if others else table
