"""What a host prints beside its answer, and why it does not answer."""

import dataclasses
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from local_client import LocalClient

from launch import host_process, sync_code
from launch.inventory import Host
from launch.network import NetworkAgents
from launch.ssh import HostError

RUN = 'eval "$2"'


@pytest.fixture
def host(tmp_path):
    return Host("a", "127.0.0.1", python=sys.executable, workdir=str(tmp_path))


def call(host, command):
    class Client(LocalClient):
        pass

    Client.command = command
    return Client([host]).call(host, {"op": "status", "job": "none"})


@pytest.mark.parametrize(
    "printed",
    ["echo hello", "printf hello", """echo '{"ok": {"known": true}}'""", "printf '\\377\\0'"],
)
def test_an_answer_is_found_behind_what_a_login_shell_prints(host, printed):
    assert call(host, f"{printed}; {RUN}")["known"] is False


@pytest.mark.parametrize("shell", ["bash", "dash", "csh", "tcsh", "fish", "zsh"])
def test_every_login_shell_runs_the_command(host, shell):
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    assert call(host, f'exec {shell} -c "$2"')["known"] is False


def test_a_command_line_has_nothing_that_a_shell_could_expand(host, monkeypatch):
    class Client(LocalClient):
        def ssh_command(self, host, shared=True):
            return ["printf", "%s"]

    with Client([host]).start(host, {"op": "status"}) as process:
        process._answering = True  # what printf writes is the command itself
        command = process.readline().decode()
    assert re.fullmatch(
        r"--aexec \S+ -I -c 'exec\(__import__\(\"base64\"\)[^'!\n$`\\\\]*'", command
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo 'This account is currently not available.'; exit 1", "no login shell.*chsh"),
        ("echo 'This account is not available'; exit 1", "no login shell.*chsh"),
        ("echo hello; exit 0", "A login script .* may end the shell.* Or a forced command"),
        ("exit 0", "no answer.*A login script .* may end the shell"),
        ("exec no-such-tmux", "it has no program no-such-tmux.*ended with 127.*login script"),
        ("echo 'only git here'; exit 0", 'did not run our command.*ended with 0, stdout "only git'),
        ("exec /no/such/python", "it has no program .*python.*Set python in the inventory"),
        ("echo hello; exit 255", 'its connection broke.*stdout "hello". Check that it is on'),
        ("exit 7", "a: it gave no answer. `ssh a` ended with 7. Try `ssh a"),
        ("head -c 9000000 /dev/zero | tr '\\0' x", "did not run our command.*xxx"),
        ("head -c 9000000 /dev/zero >&2; exit 9", "ended with 9"),
        ("printf '\\033]52;c;x\\007'; exit 1", r"stdout .\\x1b\]52;c;x\\x07"),
    ],
)
def test_a_host_that_does_not_answer_is_explained_with_its_own_words(host, command, message):
    with pytest.raises(HostError, match=message) as error:
        call(host, command)
    assert len(str(error.value)) < 1_000 and str(error.value).isprintable()


def test_a_host_that_closes_its_output_and_goes_on_is_not_waited_for(host, monkeypatch):
    monkeypatch.setattr(host_process, "END_S", 0.1)
    with pytest.raises(HostError, match="gave no answer. `ssh a` did not end and was killed"):
        call(host, "exec 1>&-; exec sleep 30")


def test_a_host_that_does_not_read_its_request_is_given_up(host, monkeypatch):
    monkeypatch.setattr(host_process, "SEND_S", 0.1)
    request = {"op": "status", "job": os.urandom(200_000).hex()}
    client = LocalClient([host])
    client.command = "exec sleep 30"
    with pytest.raises(HostError, match="a: no answer within 60 s"):
        client.call(host, request)
    monkeypatch.setattr(sync_code, "SEND_S", 0.1)
    (archive := Path(host.workdir, "archive")).write_bytes(bytes(1 << 20))
    with pytest.raises(HostError, match="a: no answer within"):
        sync_code._send(client, host, {}, str(archive))


def test_hosts_that_exceed_a_common_limit_are_distinguished_from_failed_ones(host):
    hosts = [host, dataclasses.replace(host, name="b", address="127.0.0.2")]
    client = LocalClient(hosts)
    client.ssh_command = lambda host, shared=True: [
        *("sh", "-c", "exec sleep 30" if host.name == "a" else "exit 7")
    ]
    slow, failed = client.call_all(dict.fromkeys(hosts, {"op": "status"}), 0.5).values()
    assert "a: no answer within" in str(slow) and "`ssh b` ended with 7" in str(failed)


def test_a_machine_without_ssh_is_named_as_the_problem(host, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HostError, match="a: .* cannot be run here.*Install OpenSSH"):
        LocalClient([host]).call(host, {"op": "status", "job": "none"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"error": "x\\nlaunch: job 1: exit 0"}', "a: x\n    launch: job 1"),
        ("[" * 100_000, "must be a JSON object"),
    ],
)
def test_an_error_of_a_host_cannot_look_like_a_line_of_the_launcher(host, line, message):
    class Answer:
        def readline(self, limit_s):
            return line.encode()

    with pytest.raises(HostError, match=message):
        LocalClient([host]).read_answer(host, Answer())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"error": "RuntimeError: x\\nlaunch: y"}', "a: RuntimeError: x\n    launch: y"),
        (b"nonsense", "a: its answer has no meaning"),
        (b"[" * 100_000, "a: its answer has no meaning"),
        (b'{"ok": {"time": "noon"}}', "a: its answer.time must be a finite number"),
    ],
)
def test_an_agent_that_answers_nonsense_is_named(line, message):
    class Process:
        def send(self, data):
            return True

        def readline(self, limit_s):
            return line

    host = Host("a", "127.0.0.1")
    agents = NetworkAgents(LocalClient([]))
    agents._processes, agents.first_answers = {host: Process()}, {host: {}}
    with pytest.raises(HostError, match=message):
        agents.answer_with_clock(host)
