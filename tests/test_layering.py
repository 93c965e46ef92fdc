"""The floors of the house: a module imports only from modules that stand on an earlier line."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = """
disk liveness
files run_lock axes knobs beat engine wire names memory invocation
sections
config
runtime mesh stop trees tuning
collectives
kernels fused
data.* model.* interop.*
loss optim.*
step
diagnose
metrics digest work
agree
storage.*
checkpoint
run
scalars curve export
steplog phases
measure about tracing moved
workdir
report
evaluate generate
loop
train glance
planning.*
plan
interop.__main__
study.*
optim.study
crosscheck.*
benchmarks.*
bench
profile
"""
FLOOR = {name: height for height, line in enumerate(FLOORS.split("\n")) for name in line.split()}
FILES = sorted((ROOT / "jaxtrain").rglob("*.py"))


def _name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _floor(module):
    """Height of jaxtrain.x or jaxtrain.x.y; -1 for the package itself."""
    parts = module.split(".")[1:]
    if not parts:
        return -1
    if ".".join(parts) in FLOOR:  # a file that stands above its package
        return FLOOR[".".join(parts)]
    assert parts[0] in FLOOR or f"{parts[0]}.*" in FLOOR, f"{module} has no floor in this file"
    return FLOOR.get(parts[0], FLOOR.get(f"{parts[0]}.*"))


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            known = {_name(file) for file in FILES}
            yield from [name for name in submodules if name in known] or [node.module]


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_a_module_imports_only_from_floors_below_its_own(path):
    name = _name(path)
    package = name.rsplit(".", 1)[0] if name.count(".") > 1 else name
    for imported in _imports(path):
        root = imported.split(".")[0]
        assert root not in ("tests", "configs", "launch"), f"{name} imports {imported}"
        inside = imported.startswith(f"{package}.") or imported == package
        if root != "jaxtrain" or (inside and _floor(imported) == _floor(name)):
            continue
        assert _floor(imported) < _floor(name), f"{name} imports {imported}"


def test_kernels_know_nothing_of_the_training_stack():
    for path in sorted((ROOT / "pallas_kernels").rglob("*.py")):
        roots = {imported.split(".")[0] for imported in _imports(path)}
        assert not roots & {"jaxtrain", "configs", "launch", "tests"}, path


@pytest.mark.parametrize(
    "name",
    ["axes", "beat", "config", "engine", "export", "files", "memory", "names", "sections", "wire"],
)
def test_the_ground_floor_does_not_know_jax(name):
    source = (ROOT / "jaxtrain" / f"{name}.py").read_text()
    assert "jax" not in {imported.split(".")[0] for imported in _imports_of(source)}


def _imports_of(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def _functions():
    for path in sorted(ROOT.glob("*/**/*.py")):
        if path.relative_to(ROOT).parts[0] in ("jaxtrain", "pallas_kernels", "launch", "configs"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield path, node


def test_files_stay_under_300_lines_and_functions_under_60():
    kernels = (ROOT / "pallas_kernels").rglob("*.py")
    long = [path for path in (*FILES, *kernels) if len(path.read_text().splitlines()) > 300]
    assert not long
    sizes = [(p, f.name, f.end_lineno - f.lineno + 1) for p, f in _functions()]
    assert not [entry for entry in sizes if entry[2] > 60]


@pytest.mark.parametrize("path", sorted((ROOT / "launch").rglob("*.py")), ids=_name)
def test_the_operators_side_and_the_hosts_need_the_standard_library_alone(path):
    """So a laptop needs no JAX, and hosts take the supervisor as it comes over SSH."""
    if path.name == "collectives.py":  # a program that launch.probe runs on the hosts
        return
    if path.parent.name == "templates":  # text that is printed
        return
    own = "launch.host" if path.parent.name == "host" else "launch"
    for imported in _imports_of(path.read_text()):
        root = imported.split(".")[0]
        assert root in sys.stdlib_module_names or imported.startswith(own), f"{path}: {imported}"
