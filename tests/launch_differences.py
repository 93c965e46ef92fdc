"""Cases of tests/launch_acceptance.py: a host, or what an operator sees of it, differs or changes.

Two things are only imitated. Linux has one wall clock for all namespaces, so a host's clock is
shifted in Python only, where all decisions are made, not for file times and C++ code. And ssh's
HostName takes the place of the operator's DNS.
"""

import contextlib
import re
import signal
import subprocess
import sys
import sysconfig

from launch_faults import AT_STEPS, run_with_fault
from launch_scene import TRAINER

from launch.host.exit_codes import REFUSED

PYTHON_PATH = "import importlib.metadata as m; print(m.distribution('{}')._path / 'METADATA')"
TEXT, OFFSET = "/root/text.txt", "/etc/clock_offset"
CLOCK = f"""
import os, time

def shifted(real=time.time):
    try:
        with open("{OFFSET}") as file:
            return real() + float(file.read())
    except OSError:
        return real()

def utime(path, times=None, *, real=os.utime, **values):
    if times is None and "ns" not in values:
        times = (time.time(), time.time())
    return real(path, times, **values)

time.time, os.utime = shifted, utime
"""


def write(scene, host, path, text):
    """Writes a file on a host."""
    command = scene.bed.inside(host, "tee", path)
    subprocess.run(command, input=text, text=True, check=True, stdout=subprocess.DEVNULL)


def refused(scene, launched, host, reason, code=1) -> dict:
    """Returns whether a launch ended with this status, and named the host and the reason."""
    status, output = launched.wait(), launched.output()
    found = re.search(rf"(?m)^.*{host}.*({reason}).*", output)
    return {
        f"exit {code}": status == code,
        "named": bool(found),
        "said": found[0].strip()[:200] if found else output[-300:],
        "nothing started" if code == 1 else "nothing left": not scene.left(),
    }


def clock(scene, repetition) -> dict:
    """Sets a host's clock by 10 minutes while a job runs, then starts another one.

    The running job must not notice, as no decision compares two hosts' clocks, nor two readings of
    one. The later job names the host in a warning and trains to the same end.
    """
    host, offset_s = (("h1", 600), ("h0", -600), ("h2", -600))[repetition]
    folder = sysconfig.get_path("purelib")
    write(scene, host, f"{folder}/shifted_clock.py", CLOCK)
    write(scene, host, f"{folder}/shifted_clock.pth", "import shifted_clock\n")
    strike = lambda scene: write(scene, host, OFFSET, str(offset_s))
    run = f"clock-{repetition}"
    try:
        result = run_with_fault(scene, run, AT_STEPS[repetition], strike, None, 0)
        late = refused(scene, scene.launch(f"{run}-late"), host, "correct the wrong one", code=0)
        late["same bits"] = scene.bits(f"{run}-late") == scene.reference()
    finally:
        scene.bed.run(host, "rm", "-f", OFFSET, f"{folder}/shifted_clock.pth")
    return result | {f"later: {name}": value for name, value in late.items()}


def one_byte(scene, repetition) -> dict:
    """Changes a byte of one host's data: in a block that preflight reads, or in none."""
    host, offset = (("h1", 100), ("h1", 40_000), ("h2", 40_000))[repetition]
    scene.copy_text(TEXT, times=20)
    change = f"printf X | dd of={TEXT} bs=1 seek={offset} conv=notrunc"
    scene.bed.run(host, "bash", "-c", change)
    # Preflight compares the data of this program only.
    options, values = ["--module=jaxtrain.train"], {"data.text": TEXT}
    launched = scene.launch(f"one-byte-{repetition}", *options, **values)
    if repetition == 0:
        return refused(scene, launched, host, "differs from the data of h0 h2")
    cause = rf"rank {host[1]} .*refused to go on"
    result = refused(scene, launched, f"ROOT CAUSE {host}", cause, REFUSED)
    return result | {"data named": "the data must be the same" in launched.output()}


def one_package(scene, repetition) -> dict:
    """Changes the version of one package on one host."""
    host, package = (("h1", "optax"), ("h2", "ml_collections"), ("h0", "numpy"))[repetition]
    find = [sys.executable, "-c", PYTHON_PATH.format(package)]
    path = scene.bed.run(host, *find).strip()
    scene.bed.run(host, "cp", path, "/root/METADATA")
    scene.bed.run(host, "sed", "-i", "s/^Version: .*/Version: 0.0.1/", path)
    try:
        launched = scene.launch(f"one-package-{repetition}")
        return refused(scene, launched, rf"{host}: ", "install the same on every host")
    finally:
        scene.bed.run(host, "cp", "/root/METADATA", path)


def one_line(scene, repetition) -> dict:
    """Changes a line of the code on one host: before a start, or before a restart."""
    host, run = ("h1", "h1", "h2")[repetition], f"one-line-{repetition}"
    change = "echo '# changed' >> /root/jaxtrain/code/*/jaxtrain/training/loop.py"
    try:
        if repetition != 1:
            first = scene.launch(f"{run}-first")
            first.wait_for_output("code is on every host")
            first.process.send_signal(signal.SIGINT)
            first.wait()
            scene.bed.run(host, "bash", "-c", change)
            return refused(scene, scene.launch(run), host, "edited on this host")
        launched = scene.launch(run)
        scene.wait_for(launched, run, AT_STEPS[repetition])
        scene.bed.run(host, "bash", "-c", change)
        scene.signal("h2", TRAINER, "KILL")
        cause = rf"rank {host[1]} .*refused to go on"
        result = refused(scene, launched, f"ROOT CAUSE {host}", cause, REFUSED)
        return result | {
            "code named": "the code and its libraries must be the same" in launched.output()
        }
    finally:
        scene.bed.run(host, "rm", "-rf", "/root/jaxtrain/code")


def variable_with_newlines(scene, repetition) -> dict:
    """Passes a value with newlines and quotes to the program, which must get it unchanged."""
    values = ("one\ntwo\n", "\n\r\n$(exit 3) 'a' \"b\"\n", "x=1\nJAX_PLATFORMS=tpu")
    value, received = values[repetition], []

    def strike(scene):
        for host in scene.bed.names:
            [pid] = scene.pids(host, TRAINER)
            command = scene.bed.inside(host, "cat", f"/proc/{pid}/environ")
            variables = subprocess.run(command, check=True, capture_output=True).stdout.split(b"\0")
            received.append(f"BED_TEXT={value}".encode() in variables)

    run, option = f"newlines-{repetition}", f"--env=BED_TEXT={value}"
    result = run_with_fault(scene, run, AT_STEPS[repetition], strike, None, 0, option)
    return result | {"received on every host": received == [True] * len(scene.bed.names)}


def moved_name(scene, repetition) -> dict:
    """Lets a host's name lead elsewhere: during a job, at a start, or because the host moved."""
    case = (name_of_another_during_job, name_of_another_at_start, host_with_new_address)
    return case[repetition](scene)


@contextlib.contextmanager
def name_leads_to(scene, address):
    """Lets ssh connect to another address for h1, as if its name in DNS had changed."""
    config, old = scene.bed.ssh_config, scene.bed.ssh_config.read_text()
    config.write_text(old.replace(f"HostName {scene.bed.address['h1']}\n", f"HostName {address}\n"))
    try:
        yield
    finally:
        config.write_text(old)


def name_of_another_during_job(scene) -> dict:
    said = []

    def strike(scene):
        with name_leads_to(scene, scene.bed.address["h2"]):
            folder = scene.folder / "new-connections"
            folder.mkdir()
            job = scene.newest.job
            status = scene.run("moved-status", "status", job, XDG_RUNTIME_DIR=str(folder))
            status.wait()
            said.append(status.output())

    result = run_with_fault(scene, "moved-name", AT_STEPS[0], strike, None, 0)
    return result | {"status names h1": bool(re.search("(?m)^h1 .*host key", said[0]))}


def name_of_another_at_start(scene) -> dict:
    folder = scene.folder / "new-connections-at-start"
    folder.mkdir()
    scene.env["XDG_RUNTIME_DIR"], before = str(folder), scene.env["XDG_RUNTIME_DIR"]
    try:
        with name_leads_to(scene, scene.bed.address["h2"]):
            return refused(scene, scene.launch("moved-at-start"), "h1", "host key")
    finally:
        scene.env["XDG_RUNTIME_DIR"] = before


def host_with_new_address(scene) -> dict:
    """Moves h1, and its name with it: the job must name it and restart."""
    bed = scene.bed
    old, new = bed.address["h1"], f"{bed.net}.101"
    with contextlib.ExitStack() as stack:

        def strike(scene):
            move(bed, old, new)
            stack.callback(move, bed, new, old)
            start = ["/usr/sbin/sshd", "-f", bed.folder / "sshd_config.h1"]
            bed.run("h1", *start, "-o", f"ListenAddress={new}")
            stack.enter_context(name_leads_to(scene, new))

        cause = "h1: no longer has its address"
        return run_with_fault(scene, "moved-host", AT_STEPS[0], strike, cause, 60)


def move(bed, old, new):
    """Replaces h1's address, in what all hosts know of it too."""
    # In this order: Linux removes a subnet's second address together with the first one.
    bed.run("h1", "ip", "addr", "del", f"{old}/24", "dev", "lan0")
    bed.run("h1", "ip", "addr", "add", f"{new}/24", "dev", "lan0")
    for name in bed.names:
        bed.run(name, "sed", "-i", f"s/^{old} /{new} /", "/etc/hosts")


CASES = {
    "clock": clock,
    "one-byte": one_byte,
    "one-package": one_package,
    "one-line": one_line,
    "newlines": variable_with_newlines,
    "moved-name": moved_name,
}
