import dataclasses
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import bed as beds
import pytest

from launch.host.restart_policy import Policy
from launch.inventory import Host
from launch.job import Job
from launch.prepare import read_env
from launch.ssh import HostError, SshClient, control_path

HOST = Host("a", "10.0.0.1", user="u", port=2200, interface="eth1")


@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs ssh")
def test_the_users_configuration_cannot_disable_host_keys_open_a_port_or_run_another_command(
    tmp_path,
):
    config = tmp_path / "config"
    config.write_text(
        "Host *\n  StrictHostKeyChecking no\n  ForwardAgent yes\n  BatchMode no\n"
        "  LocalForward 8080 localhost:80\n  ForwardX11 yes\n"
        "  RemoteCommand tmux\n  RequestTTY force\n"
    )
    command = [*SshClient([HOST], str(config)).ssh_command(HOST), "-G", "--", HOST.target]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    options = dict(line.partition(" ")[::2] for line in printed.splitlines())
    wanted = {"stricthostkeychecking": "true", "forwardagent": "no", "batchmode": "yes"}
    wanted |= {"forwardx11": "no", "clearallforwardings": "yes", "user": "u", "port": "2200"}
    wanted |= {"requesttty": "false"}
    assert {name: options[name] for name in wanted} == wanted
    assert options.get("remotecommand", "none") == "none"


@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs ssh")
def test_a_missing_ssh_configuration_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    config = tmp_path / "a [b]"
    with pytest.raises(HostError, match="--ssh_config must name a file; got .*a .b.*"):
        SshClient([HOST], str(config)).ssh_command(HOST)
    config.write_text("Host a\n  HostName elsewhere\n")
    command = [*SshClient([HOST], str(config)).ssh_command(HOST), "-G", "--", "a"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "hostname elsewhere\n" in printed


def test_threads_that_write_the_options_at_once_never_read_a_partial_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    client = SshClient([Host(f"h{i}", "10.0.0.1") for i in range(32)])
    [text] = set(client.map(lambda host: Path(client.ssh_command(host)[2]).read_text()).values())
    assert text.endswith("Include ~/.ssh/config\nInclude /etc/ssh/ssh_config\n")


@pytest.mark.skipif(bool(beds.available()), reason=beds.available())
def test_the_key_of_a_jump_host_is_verified_even_if_the_configuration_accepts_any(monkeypatch):
    with beds.Bed(2) as bed:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(bed.folder))
        config = bed.folder / "jump"
        config.write_text(f"Host h1\n  ProxyJump h0\n{bed.ssh_config.read_text()}")
        host = Host("h1", bed.address["h1"], python=sys.executable)
        request = {"op": "status", "job": "none"}
        assert SshClient([host], str(config)).call(host, request) == {
            "known": False,
            "processes": [],
        }
        careless = bed.folder / "careless"
        unknown = f"Host h0\n  StrictHostKeyChecking no\n  UserKnownHostsFile {bed.folder}/none\n"
        careless.write_text(unknown + config.read_text())
        unshared = SshClient([host], str(careless)).ssh_command(host, shared=False)
        refused = subprocess.run([*unshared, "--", "h1", "true"], capture_output=True, text=True)
        assert refused.returncode == 255 and "Host key verification failed" in refused.stderr


def test_a_shared_connections_socket_has_a_short_path_in_a_private_folder(tmp_path, monkeypatch):
    short = tmp_path / "s"
    limit = len(str(short)) + 100
    for where in (short, tmp_path / ("long" * 30)):
        where.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    path = control_path("h", limit)
    assert path.startswith(f"{short}/jaxtrain-{os.getuid()}/") and path.endswith("%C")
    folder = short / f"jaxtrain-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    with pytest.raises(HostError, match="mode 700"):
        control_path("h", limit)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("long" * 30)))
    assert "long" not in control_path("h", limit) and control_path("h", 10) == "none"


def test_two_names_of_one_address_share_no_connection(tmp_path, monkeypatch):
    """Or the second host's key would not be checked if its name led to the first one."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    client = SshClient([HOST])
    command = lambda ssh: client.ssh_command(dataclasses.replace(HOST, name="h", ssh=ssh))
    assert command("a") == command("a") != command("b")


def test_env_without_a_value_takes_it_from_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "a=b c")
    monkeypatch.delenv("NOT_SET", raising=False)
    assert read_env(["SECRET", "X=1=2", "Y="]) == {"SECRET": "a=b c", "X": "1=2", "Y": ""}
    with pytest.raises(ValueError, match="--env=NOT_SET"):
        read_env(["NOT_SET"])


def test_a_start_request_has_the_hosts_interface_and_built_python(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path))
    record = {"ranks_per_host": 1, "argv": ["{python}", "-m", "m"], "env": {"A": "{python}"}}
    job = Job.create([HOST], Policy(), "", **record, folders={"a": "/code"})
    assert job.request(HOST)["spec"]["env"]["NCCL_SOCKET_IFNAME"] == "=eth1"
    assert job.request(HOST)["spec"]["argv"][0] == "python3"
    assert stat.S_IMODE((job.folder / "job.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(job.folder.stat().st_mode) == 0o700
    job.change(pythons={"a": "/envs/1/bin/python"}, scopes=["a"])
    request = job.request(HOST)
    assert request["spec"]["argv"] == ["/envs/1/bin/python", "-m", "m"]
    assert request["scope"] is True


def test_the_users_pythonpath_comes_after_the_jobs_code(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path))
    record = {"ranks_per_host": 1, "argv": ["{python}", "-m", "m"], "folders": {"a": "/code"}}
    paths = [
        Job.create([HOST], Policy(), "", **record, env=env).request(HOST)["spec"]["env"]
        for env in ({}, {"PYTHONPATH": "/a:/b"})
    ]
    assert [env["PYTHONPATH"] for env in paths] == ["/code", "/code:/a:/b"]
