"""A module imports only from its own folder and from the layers below it; no import is circular."""

import ast
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports only from its own folder and from folders on earlier lines.
LAYERS = """
errors axes files file_errors
config
run_directory
distributed
ops
model
data
optim
metrics
reporting checkpoint
sites
training
interop planning
train evaluate generate plan profile doctor
branching crosscheck study
ladder
benchmarks bench cli __main__
"""
LAYER = {name: i for i, line in enumerate(LAYERS.strip().split("\n")) for name in line.split()}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
PACKAGES = ("jaxtrain", "pallas_kernels", "launch")
FILES = {name: sorted((ROOT / name).rglob("*.py")) for name in PACKAGES}
FILES["launch"] = [path for path in FILES["launch"] if path.parent.name != "templates"]


def _name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {_name(path) for paths in FILES.values() for path in paths}


@functools.cache
def _statements(path):
    """Returns (nodes of imports, nodes of functions) of a file, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return imports, [node for node in nodes if isinstance(node, FUNCTIONS)]


def _imports(path):
    """Yields the full name of each module that a file imports, wherever in the file."""
    for node in _statements(path)[0]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            assert node.level == 0, f"{path}: write imports in full"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [name for name in submodules if name in NAMES] or [node.module]


def _layer(module):
    """Returns the index of the line that lists a module's folder; -1 for jaxtrain itself."""
    parts = module.split(".")
    if len(parts) == 1:
        return -1
    assert parts[1] in LAYER, f"{module}: add {parts[1]} to LAYERS in tests/test_layering.py"
    return LAYER[parts[1]]


@pytest.mark.parametrize("path", FILES["jaxtrain"], ids=_name)
def test_a_module_imports_only_from_layers_below_its_own(path):
    name = _name(path)
    for imported in _imports(path):
        root = imported.split(".")[0]
        assert root not in ("tests", "configs", "launch"), f"{name} imports {imported}"
        if root == "jaxtrain" and name.split(".")[1:2] != imported.split(".")[1:2]:
            same_line = _layer(imported) == _layer(name) and "." not in name.partition(".")[2]
            assert _layer(imported) < _layer(name) or same_line, f"{name} imports {imported}"


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_do_not_import_each_other_in_a_circle(package):
    graph = {
        _name(path): {name for name in _imports(path) if name in NAMES} - {_name(path)}
        for path in FILES[package]
    }
    while free := {name for name, imported in graph.items() if not imported & graph.keys()}:
        graph = {name: imported for name, imported in graph.items() if name not in free}
    assert not graph, f"these import each other: {sorted(graph)}"


def test_kernels_know_nothing_of_the_training_stack():
    for path in FILES["pallas_kernels"]:
        roots = {imported.split(".")[0] for imported in _imports(path)}
        assert not roots & {"jaxtrain", "configs", "launch", "tests"}, path


@pytest.mark.parametrize(
    "name",
    [
        *("axes", "cli", "errors", "files", "config.command_line", "config.commands"),
        *(
            "config.model_section",
            "config.run_sections",
            "config.sections",
            "config.config_files",
            "config.train_config",
            "distributed.cluster",
        ),
        *("distributed.heartbeat", "distributed.memory", "metrics.names", "metrics.network"),
        *("reporting.prometheus",),
    ],
)
def test_modules_that_start_fast_do_not_import_jax(name):
    imported = _imports(ROOT / "jaxtrain" / f"{name.replace('.', '/')}.py")
    assert "jax" not in {module.split(".")[0] for module in imported}


def test_files_stay_under_300_lines_and_functions_under_100():
    files = (*FILES["jaxtrain"], *FILES["pallas_kernels"])
    long = [path for path in files if len(path.read_text().splitlines()) > 300]
    assert not long
    paths = [path for name in (*PACKAGES, "configs") for path in (ROOT / name).rglob("*.py")]
    sizes = [(p, f.name, f.end_lineno - f.lineno + 1) for p in paths for f in _statements(p)[1]]
    assert len(sizes) > 1000 and not [entry for entry in sizes if entry[2] > 100]


# Files of launch that read run directories. The others run before anything is installed.
REPORT = ("launch.report", "launch.summary", "launch.compare", "launch.slo")
REPORT_LIBRARIES = {"jinja2", "numpy", "scipy"}


@pytest.mark.parametrize("path", FILES["launch"], ids=_name)
def test_launch_needs_no_jax_and_only_its_reports_need_other_libraries(path):
    """A laptop can start jobs without JAX, and hosts receive the supervisor over SSH as it is."""
    if path.name == "collectives.py":  # a program that launch.probe runs on the hosts
        return
    own = "launch.host" if path.parent.name == "host" else "launch"
    reports = _name(path).startswith(REPORT)
    for imported in _imports(path):
        root = imported.split(".")[0]
        allowed = root in sys.stdlib_module_names or imported.startswith(own)
        assert allowed or (reports and root in REPORT_LIBRARIES), f"{path}: {imported}"
        assert reports or not imported.startswith(REPORT), f"{path}: {imported}"
