import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from jaxtrain.distributed.cluster import World, detect_world
from launch.host.exit_codes import REFUSED
from launch.template import TEMPLATES, main, read_template


class RecordingEnvironment(dict):
    """An environment that records which of its variables were read."""

    def __init__(self, variables):
        super().__init__(variables)
        self.names = set()

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)

    def __contains__(self, name):
        self.names.add(name)
        return super().__contains__(name)


def world(variables):
    """Returns the World that is detected from variables; checks that all of JAX's were read."""
    env = RecordingEnvironment(variables)
    detected = detect_world(env)
    assert {name for name in variables if name.startswith("JAX")} <= env.names
    return detected


def worlds(coordinator, count):
    return [World("JAX_*", coordinator, count, i, None, count) for i in range(count)]


def test_the_pods_of_a_jobset_become_the_processes_of_one_job():
    spec = yaml.safe_load(read_template("jobset"))
    [job] = spec["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    [container] = pods["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    detected = [world(env | {"JOB_COMPLETION_INDEX": str(i)}) for i in range(pods["completions"])]
    name = spec["metadata"]["name"]
    first = f"{name}-{job['name']}-0-0.{name}:{container['ports'][0]['containerPort']}"
    assert detected == worlds(first, pods["parallelism"])
    [rule] = pods["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    [refused] = spec["spec"]["failurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [REFUSED] and refused["action"] == "FailJobSet"
    # Source: ruleNameFmt in JobSet's pkg/webhooks/jobset_webhook.go
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", refused["name"])


def test_the_nodes_of_a_skypilot_task_become_the_processes_of_one_job():
    task = yaml.safe_load(read_template("skypilot"))
    count = task["num_nodes"]
    ips = "\n".join(f"10.0.0.{i + 1}" for i in range(count))
    variables = lambda i: {"SKYPILOT_NODE_IPS": ips, "SKYPILOT_NODE_RANK": str(i)}
    assert [world(variables(i)) for i in range(count)] == [
        World("SkyPilot", "10.0.0.1:62317", count, i, None, count) for i in range(count)
    ]
    assert not {"envs", "secrets"} & task.keys()  # they would override SkyPilot's variables


def test_the_systemd_service_is_one_process_or_with_its_commented_lines_one_of_several():
    text = read_template("systemd")
    variables = lambda prefix: dict(re.findall(rf"^{prefix}Environment=(\w+)=(.*)$", text, re.M))
    assert world(variables("")) == World()
    marked = variables("#")
    detected = [world(marked | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]
    assert detected == worlds("10.0.0.11:8476", 2)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_accepts_the_service(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"  # the program must exist under the home folder
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    service = tmp_path / "jaxtrain.service"
    service.write_text(read_template("systemd"))
    env = os.environ | {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    command = ["systemd-analyze", "verify", "--user", "--man=no", str(service)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr  # unknown keys are only warnings


@pytest.mark.parametrize("name", [n for n, file in TEMPLATES.items() if file.endswith(".sh")])
def test_a_shell_template_parses_and_starts_the_training_program(name):
    text = read_template(name)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert '-m jaxtrain.train "$@"' in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_printed_unchanged_and_documents_what_was_tested(name, capsys):
    assert main([name]) == 0
    text = capsys.readouterr().out
    assert text == read_template(name) and f"launch.template {name}" in text
    assert re.search(r"^(# )?(Ran on|Checked): ", text, re.M) and "Not run: " in text
