"""A short form of tests/launch_acceptance.py: a few of its cases, once, with the real trainer."""

import json
import subprocess
import sys
from pathlib import Path

import bed as beds
import pytest
from launch_scene import passes

ROOT = Path(__file__).parent.parent
CASES = ["supervisor-rank", "two-operators", "one-line"]
reason = beds.available()


@pytest.mark.long
@pytest.mark.skipif(bool(reason), reason=reason)
def test_cases_with_two_faults_two_operators_and_two_versions_of_the_code_pass():
    argv = [sys.executable, "tests/launch_acceptance.py", *CASES, "--times=1"]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    results = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert [result["case"] for result in results] == CASES, ran.stderr[-2000:]
    assert all(passes(result) for result in results), results
    assert ran.returncode == 0
