"""Stage tests of suite first-day: runs `pytest -m gpu` and stores a row for each test.

    python -m jaxtrain.benchmarks.gpu_tests --out=tests.jsonl --minutes=10

A row is written as soon as its test has ended, and a second call with the same --out runs only the
tests that have none. Three kinds of tests end the process, and another one runs the others:
    - one that does not end within --test-seconds has failed; the log shows where it was
    - one whose error is CUDA's has failed; in its process every later test would fail too
    - one that crashes runs again, after all others, and has failed if it crashes again

This module is also the pytest plugin that writes the rows.
"""

import faulthandler
import functools
import importlib.util
import json
import os
import sys
import time
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
LIMIT_S = "JAXTRAIN_TEST_LIMIT_S"  # variable with the time limit of a test
PYTEST_FAILURES = (0, 1, 5)  # exit statuses: all passed, some failed, none were left to run
WATCHDOG_STATUS = 1  # with which faulthandler ends the process, in the middle of a test
CUDA_STATUS = 86  # after an error of CUDA
CUDA_ERRORS = ("CUDA_ERROR", "CUDA error")  # as XLA and PyTorch report them


@functools.cache
def _appender() -> Appender:
    return Appender(os.environ[ROWS])


def _write(row: dict[str, Any]) -> None:
    _appender().write(f"{strict_json(row)}\n".encode())


@functools.cache
def _terminal() -> int:
    """Returns a copy of stderr, which pytest redirects during a test."""
    return os.dup(2)


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
    # A thread in C, which also ends a process whose Python waits in a call of the driver.
    limit_s = float(os.environ[LIMIT_S])
    faulthandler.dump_traceback_later(limit_s, exit=True, file=_terminal())


def pytest_runtest_logfinish() -> None:
    faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: Any) -> None:
    """Writes the outcome of a test: of its call, or of a set-up or tear-down that did not pass."""
    if report.when == "call" or report.outcome != "passed":
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        error = ""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            error = crash.message if crash else str(report.longrepr)
            row["error"] = error[:500]
        _write(row)
        if any(name in error for name in CUDA_ERRORS):
            print(report.longreprtext, flush=True)  # pytest prints it only at its end
            os._exit(CUDA_STATUS)


def find_unended(path: Path) -> tuple[str, int]:
    """Returns (the test that was running when its process ended, how often it has been started).

    It is "" if none was running.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if "test" in row]
    if not rows or "outcome" in rows[-1]:
        return "", 0
    return rows[-1]["test"], sum("outcome" not in r and r["test"] == rows[-1]["test"] for r in rows)


def run_tests(command: list[str], out: Path, until_s: float, env: dict[str, str]) -> bool:
    """Runs pytest until the time is up or it has ended, again after each test that ended it.

    Returns whether pytest could run all tests for which there was time.
    """
    while True:
        before = out.read_bytes() if out.exists() else b""
        limit_s = max(until_s - time.monotonic(), 0.1)
        status = run_process_group(command, sys.stdout, limit_s, os.environ | env)
        test, starts = find_unended(out)
        if status is None or status in PYTEST_FAILURES and not test:
            return True
        if before == (out.read_bytes() if out.exists() else b""):
            return False  # it ends before any test
        error = f"it ended its process twice: exit status {status}" if starts > 1 else ""
        if status == WATCHDOG_STATUS:
            error = f"it did not end within {env[LIMIT_S]} s"
        if test and error:
            with open(out, "a") as file:
                row = {"test": test, "outcome": "failed", "error": error}
                file.write(f"{strict_json(row)}\n")


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
    text = "time limit of a test; default: 60"
    parser.add_argument(
        "--test-seconds", type=positive(float), default=60.0, metavar="S", help=text
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
    env[LIMIT_S] = f"{args.test_seconds:g}"
    os.chdir(ROOT)
    could_run = run_tests(command, out, time.monotonic() + 60 * args.minutes, env)
    compact(out, {"tiny": True} if args.tiny else {})
    return 0 if could_run else 1


if __name__ == "__main__":
    sys.exit(main())
