"""Stage tests of suite first-day: runs `pytest -m gpu` and stores a row for each test.

    python -m jaxtrain.benchmarks.gpu_tests --out=tests.jsonl --minutes=10

A row is written as soon as its test has ended, and a second call with the same --out runs only the
tests that have none. A test that was running when its process died has the row of its start: it
runs last, so that a test that crashes the process does not keep the others from running.

This module is also the pytest plugin that writes the rows.
"""

import functools
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from jaxtrain.benchmarks.child import run_process_group
from jaxtrain.file_errors import Appender
from jaxtrain.files import strict_json, write_atomic
from pallas_kernels.arguments import Parser, positive

ROOT = Path(__file__).parent.parent.parent
ROWS = "JAXTRAIN_TEST_ROWS"  # variable with the path of the rows, which turns the plugin on
# A trial needs no GPU, so it runs one quick file instead of the tests that do.
SELECTED = {False: ("-m", "gpu", "tests"), True: ("-m", "not gpu", "tests/test_axes.py")}
PYTEST_FAILURES = (0, 1, 5)  # exit statuses: all passed, some failed, none were left to run


@functools.cache
def _appender() -> Appender:
    return Appender(os.environ[ROWS])


def _write(row: dict[str, Any]) -> None:
    _appender().write(f"{strict_json(row)}\n".encode())


def read_outcomes(path: Path) -> dict[str, str]:
    """Returns {test: outcome} of the rows so far; "started" is that of a test that did not end."""
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    return {row["test"]: row.get("outcome", "started") for row in rows if "test" in row}


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leaves out the tests that have an outcome; runs those last that did not end."""
    known = read_outcomes(Path(os.environ[ROWS]))
    done = [item for item in items if known.get(item.nodeid, "started") != "started"]
    config.hook.pytest_deselected(items=done)
    items[:] = [item for item in items if item not in done]
    items.sort(key=lambda item: item.nodeid in known)


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"test": nodeid})


def pytest_runtest_logreport(report: Any) -> None:
    """Writes the outcome of a test: of its call, or of a set-up or tear-down that did not pass."""
    if report.when == "call" or report.outcome != "passed":
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            row["error"] = (crash.message if crash else str(report.longrepr))[:500]
        _write(row)


def compact(path: Path, extra: dict[str, Any]) -> None:
    """Rewrites the rows: the last row of each test only, with fields that all of them get."""
    lines = path.read_text().splitlines() if path.exists() else []
    last = {row["test"]: row for row in map(json.loads, lines) if "test" in row}
    rows = [row if "outcome" in row else row | {"unfinished": True} for row in last.values()]
    write_atomic(path, "".join(f"{strict_json(row | extra)}\n" for row in rows))


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m jaxtrain.benchmarks.gpu_tests", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="file for the rows")
    parser.add_argument(
        "--minutes", type=positive(float), default=10.0, help="time limit; default: 10"
    )
    parser.add_argument("--tiny", action="store_true", help="a trial with other tests, on a CPU")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    missing = "" if (ROOT / "tests" / "conftest.py").exists() else f"no tests beside {ROOT}"
    if not importlib.util.find_spec("pytest"):
        missing = "pytest is not installed"
    if missing:
        write_atomic(out, strict_json({"skipped": missing}) + "\n")
        return 0
    # addopts asks for several processes, which would share the card.
    command = [sys.executable, "-m", "pytest", *SELECTED[args.tiny], "-v", "-o", "addopts="]
    command += ["-p", "jaxtrain.benchmarks.gpu_tests", "-p", "no:cacheprovider"]
    env = {ROWS: str(out), "JAX_PLATFORMS": "cpu" if args.tiny else "cuda"}
    os.chdir(ROOT)
    status = run_process_group(command, sys.stdout, 60 * args.minutes, os.environ | env)
    compact(out, {"tiny": True} if args.tiny else {})
    return 0 if status is None or status in PYTEST_FAILURES else 1


if __name__ == "__main__":
    sys.exit(main())
