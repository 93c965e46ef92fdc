import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from local_client import LocalClient
from run_directories import series, write_run

from launch.host.environment import build_environment, environment_key, requirements
from launch.host.restart_policy import Policy
from launch.inventory import Host
from launch.job import PYTHON, TRAINER, Job
from launch.prepare import (
    _check_summary,
    build_environments,
    judge_data,
    judge_directories,
    prepare,
    read_constraints,
    read_env,
)
from launch.pull import RunCopy
from launch.ssh import HostError, SshClient
from launch.stop import stop_request
from launch.sync_code import Code

HOSTS = [Host(name, f"10.0.0.{i + 1}") for i, name in enumerate("abc")]
PYPROJECT = """
[project]
name = "own"
dependencies = ["tiny>=1"]
[project.optional-dependencies]
more = ["own[most]"]
most = ["absent"]
"""


class LocalBuilds(SshClient):
    """Builds the environments of all hosts on this machine."""

    def __init__(self, hosts, root):
        super().__init__(hosts)
        self.root = root

    def call_all(self, requests, timeout_s):
        return {host: build_environment(self.root, request) for host, request in requests.items()}


def write_wheel(folder, version):
    """Writes the smallest wheel that pip installs: a package `tiny` with only its version."""
    info = f"tiny-{version}.dist-info"
    files = {
        "tiny.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


@pytest.fixture
def make_request(tmp_path, monkeypatch):
    for version in ("1.0", "2.0"):
        write_wheel(tmp_path, version)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return lambda extras=(): {
        "constraints": "tiny==1.0\n",
        "pyproject": PYPROJECT,
        "extras": list(extras),
    }


def test_packages_are_built_once_and_a_failed_build_reports_pips_last_lines(tmp_path, make_request):
    root = tmp_path / "root"
    root.mkdir()
    built = build_environment(root, make_request())
    printed = subprocess.run(
        [built["python"], "-c", "import tiny; print(tiny.version)"], capture_output=True, text=True
    )
    assert printed.stdout == "1.0\n" and built["versions"]["tiny"] == "1.0"
    [environment] = [path for path in (root / "envs").iterdir() if (path / "bin").is_dir()]
    (environment / "marker").write_text("")
    again = build_environment(root, make_request())
    assert again["python"] == built["python"] and (environment / "marker").exists()
    arguments = ("tiny==1.0\n", PYPROJECT, [])
    assert build_environments(LocalBuilds(HOSTS, root), *arguments).keys() == {"a", "b", "c"}
    with_gpus = [Host("g", "10.0.0.9", gpus=8)]
    with pytest.raises(HostError, match="g: JAX has no CUDA plugin there: .*--env_extras=cuda"):
        build_environments(LocalBuilds(with_gpus, root), *arguments)
    with pytest.raises(RuntimeError, match=r"(?s)pip.* ended with 1.*No matching .* absent"):
        build_environment(root, make_request(["more"]))
    left = [path.name for path in (root / "envs").iterdir() if path.is_dir()]
    assert left == [environment.name]  # the failed build left nothing


def test_nested_extras_are_resolved_and_an_unknown_one_is_refused():
    project = tomllib.loads(PYPROJECT)["project"]
    assert requirements(project, ["more"]) == ["tiny>=1", "absent"]
    with pytest.raises(ValueError, match=r"must be among \['more', 'most'\]; got 'cuda'"):
        requirements(project, ["cuda"])


def test_an_environments_name_depends_on_everything_that_decides_its_content():
    keys = [
        environment_key(*parts)
        for parts in (
            ("a==1", PYPROJECT, []),
            ("a==2", PYPROJECT, []),
            ("a==1", PYPROJECT + " ", []),
            ("a==1", PYPROJECT, ["more"]),
            ("a==1", PYPROJECT, [], "3.12"),
        )
    ]
    assert len(set(keys)) == 5 and environment_key("a==1", PYPROJECT, []) == keys[0]


def test_a_host_whose_data_differs_or_is_missing_has_a_problem():
    same = {"files": 2, "bytes": 30, "fingerprint": "a" * 32}
    other = same | {"fingerprint": "b" * 32}
    findings = judge_data(dict(zip(HOSTS, (same, other, same), strict=True)))
    assert [f.host for f in findings if f.problem] == ["b"]
    assert findings[1].fatal and "differs from the data of a c" in findings[1].problem
    findings = judge_data(dict(zip(HOSTS, (same, same, HostError("c: no shards")), strict=True)))
    assert [(f.host, f.problem) for f in findings if f.problem] == [("c", "c: no shards")]


def test_a_run_directory_that_another_run_writes_to_has_a_problem_that_names_it():
    owner = {"pid": 7, "host": "h", "start": "2026-11-26 12:00:00 UTC"}
    free = {"workdir": "/runs/a", "owner": {}}
    run, job = free | {"owner": owner}, free | {"owner": owner | {"job": "1126-a"}}
    findings = judge_directories(dict(zip(HOSTS, (free, run, job), strict=True)))
    assert [finding.aborts for finding in findings] == [False, True, True]
    assert {finding.value for finding in findings} == {"/runs/a"}
    assert "a run (pid 7 on h since 2026-11-26 12:00:00 UTC)" in findings[1].problem
    assert "`kill 7` there" in findings[1].problem and "--workdir" in findings[1].problem
    assert "job 1126-a (pid 7" in findings[2].problem and "stop 1126-a" in findings[2].problem


@pytest.mark.parametrize("pair", ["=x", "="])
def test_a_variable_without_a_name_is_refused(pair):
    with pytest.raises(ValueError, match="--env must be NAME or NAME=VALUE"):
        read_env([pair])


def test_constraints_that_are_no_text_are_refused_by_their_flag(tmp_path):
    (tmp_path / "constraints").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match="--env_build must name a file of pip constraints"):
        read_constraints(str(tmp_path / "constraints"))


RIGHT = {"files": 1, "bytes": 2, "fingerprint": "a" * 32, "workdir": "/runs/a"}
OWNER = {"pid": 7, "host": "h", "start": "2026-11-26 12:00:00 UTC", "job": "1126-120000-9f3c.ny"}


@pytest.mark.parametrize(
    "summary",
    [
        [],
        {},
        {"fingerprint": 1},
        RIGHT,
        RIGHT | {"owner": {}, "bytes": 10**400},
        RIGHT | {"owner": OWNER | {"job": "x; rm -rf ~"}},
        RIGHT | {"owner": OWNER | {"job": "-x"}},
        RIGHT | {"owner": OWNER | {"pid": "7; reboot"}},
        RIGHT | {"owner": OWNER | {"host": "h): run `reboot"}},
        RIGHT | {"owner": OWNER | {"start": "now\n"}},
        RIGHT | {"owner": {"pid": 7}},
    ],
)
def test_a_summary_of_the_data_that_has_no_meaning_is_a_finding(
    tmp_path, monkeypatch, capsys, summary
):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path))
    record = {"argv": ["python", "-m", TRAINER], "env": {}, "ranks_per_host": 1}
    job = Job.create(HOSTS[:1], Policy(), "", **record, folders={"a": "/code"})

    class Odd(SshClient):
        def call_all(self, requests, timeout_s):
            return dict.fromkeys(requests, summary)

    with pytest.raises(HostError, match="preflight: nothing was started"):
        prepare(Odd(HOSTS[:1]), job, Code(tmp_path, [], "", "", ""))
    assert re.search("a: its answer.* must be ", capsys.readouterr().err)


@pytest.mark.parametrize("owner", [OWNER, OWNER | {"job": ""}, OWNER | {"boot": "x", "run": None}])
def test_a_summary_with_an_owner_names_its_job_or_its_process(owner):
    _check_summary(HOSTS[0], RIGHT | {"owner": owner})
    [finding] = judge_directories({HOSTS[0]: RIGHT | {"owner": owner}})
    assert ("stop 1126-120000-9f3c.ny" if owner["job"] else "kill 7") in finding.problem
    _check_summary(HOSTS[0], RIGHT | {"owner": {}})


def test_without_flags_the_trainers_own_run_directory_has_one_writer_and_is_copied(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    run, code = write_run(tmp_path / "code" / "runs" / "debug", series(60)), tmp_path / "code"
    (code / "jaxtrain").mkdir()
    (code / "jaxtrain" / "train.py").write_text("import time\ntime.sleep(60)\n")
    host = Host("a", "127.0.0.1", python=sys.executable, workdir=str(tmp_path / "host"))

    class Answers(LocalClient):
        def call_all(self, requests, timeout_s):
            return dict.fromkeys(requests, RIGHT | {"owner": {}, "workdir": str(run)})

    client = Answers([host])
    record = {"argv": [PYTHON, "-m", TRAINER, "debug"], "env": {}, "ranks_per_host": 1}
    jobs = [Job.create([host], Policy(), "", **record, folders={"a": str(code)}) for _ in "12"]
    for job in jobs:
        prepare(client, job, Code(code, [], "", "", ""))
    assert client.call(host, jobs[0].request(host)) == {"started": True}
    try:
        with pytest.raises(HostError, match=f"{jobs[0].id} .*is running and writes to {run}"):
            client.call(host, jobs[1].request(host))
        copy = RunCopy(jobs[0].id)
        copy.client = client
        assert (copy.fetch() / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    finally:
        for job in jobs:
            client.call(host, stop_request(job, "", kill=True))
