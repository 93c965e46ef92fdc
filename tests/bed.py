"""Several hosts on one machine, for tests of the launcher: namespaces, real sshd, real links.

    python -m tests.bed 3 -- COMMAND     runs COMMAND with BED_HOSTS and BED_SSH_CONFIG set

Each host has its own network, mount, pid and uts namespace, a root that is an overlay in memory,
and an sshd with its own key. All hang on one bridge, which the operator (this process) shares, or
on a relay (tests/relay.py), whose links have a length. A link that is cut drops packets without a
word, as a cable does; a host that is killed first loses its link, so that the kernel says no
goodbye for it. Needs root and Linux.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import relay

OPERATOR = "operator"  # its name on a relay
QUEUE = "5000"  # packets that a device holds until the relay reads them
INIT = r"""
set -e
mount --make-rprivate /
mkdir -p "$1/up" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/up,workdir=$1/work" "$1/root"
cd "$1/root"
mkdir -p old
mount -t proc proc proc
mount --rbind /dev dev
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs tmpfs run
mount --rbind /sys sys
if [ -n "$4" ]; then mkdir -p mnt/shared; mount --bind "$4" mnt/shared; fi
cp "$3/hosts" etc/hosts
hostname "$2"
pivot_root . old
cd /
mkdir -p /run/sshd /root/.ssh
cp "$3/client.pub" /root/.ssh/authorized_keys
chmod -R go= /root/.ssh
umount -l /old
exec /usr/sbin/sshd -D -e -f "$3/sshd_config.$2"
"""


def available(relayed=False) -> str:
    """ "" where a bed can be made, else the reason why not."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return "a bed of hosts needs root on Linux"
    for tool in ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd"):
        if shutil.which(tool) is None:
            return f"a bed of hosts needs {tool}"
    if relayed and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "a relayed bed needs /dev/net/tun"
    name = f"jtry{secrets.token_hex(2)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"a bed of hosts needs network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


def sh(*argv, **kwargs):
    return subprocess.run(argv, check=True, capture_output=True, text=True, **kwargs).stdout


class Bed:
    """`count` hosts, h0 to h{count-1}, as a context manager.

    Args:
        shared: a folder that all hosts see as /mnt/shared; None for none.
        relayed: links of a relay, see `link`, in place of a bridge.

    Attributes:
        ssh_config: for `ssh -F`; address: {host: IP}; folder: of keys and settings.
    """

    def __init__(self, count=3, shared=None, relayed=False):
        self.names = [f"h{i}" for i in range(count)]
        self.tag, self.net = secrets.token_hex(2), f"10.77.{secrets.randbelow(250)}"
        self.address = {name: f"{self.net}.{i + 1}" for i, name in enumerate(self.names)}
        self.shared, self._inits, self.relayed = str(shared or ""), {}, relayed

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.folder = Path(tempfile.mkdtemp(prefix="jaxtrain-bed-"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            (self.folder / "disks").mkdir()  # a power loss keeps them
            sh("mount", "-t", "tmpfs", "tmpfs", str(self.folder / "disks"))
            stack.callback(sh, "umount", "-l", str(self.folder / "disks"))
            self.ssh_config = self.folder / "ssh_config"
            self._write_settings()
            if self.relayed:
                self._start_relay(stack)
            else:
                sh("ip", "link", "add", self.bridge, "type", "bridge")
                stack.callback(sh, "ip", "link", "del", self.bridge)
            sh("ip", "addr", "add", f"{self.net}.254/24", "dev", self.bridge)
            sh("ip", "link", "set", self.bridge, "up")
            for name in self.names:
                stack.callback(self._remove, name)
                self.boot(name)
            self._close = stack.pop_all()
        return self

    def __exit__(self, *exc):
        self._close.close()

    @property
    def bridge(self) -> str:
        """The operator's interface, on either kind of bed."""
        return f"jb{self.tag}"

    def _start_relay(self, stack):
        self._socket = self.folder / "relay"
        command = [sys.executable, relay.__file__, str(self._socket)]
        program = subprocess.Popen(command, stdout=subprocess.PIPE)
        stack.callback(program.wait)
        stack.callback(program.kill)  # and with it its devices
        with program.stdout as said:
            assert said.readline(), "the relay does not start"
        self._add(OPERATOR, f"{self.net}.254", self.bridge)
        sh("ip", "link", "set", self.bridge, "txqueuelen", QUEUE)

    def _add(self, name, address, device):
        request = {"do": "add", "name": name, "address": address, "device": device}
        relay.ask(self._socket, request)

    def link(self, a, b, **values):
        """Sets both ways between two hosts of a relayed bed, `*` for all: see relay.Link."""
        for given, to in ((a, b), (b, a)):
            relay.ask(self._socket, {"do": "link", "from": given, "to": to} | values)

    def traffic(self) -> dict:
        """{"h0 > h1": counters of the relay}: packets, segments, bytes, dropped, lost."""
        return relay.ask(self._socket, {"do": "stats"})

    def _netns(self, name):
        return f"j{self.tag}{name}"

    def _write_settings(self):
        for key in ("client", *self.names):
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        hosts = ["127.0.0.1 localhost"] + [f"{a} {n}" for n, a in self.address.items()]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        known, config = [], []
        for name, address in self.address.items():
            public = (self.folder / f"{name}.pub").read_text().split()
            known.append(f"{name} {public[0]} {public[1]}")
            config.append(f"Host {name}\n  HostName {address}\n  HostKeyAlias {name}")
            (self.folder / f"sshd_config.{name}").write_text(
                f"ListenAddress {address}\nHostKey {self.folder / name}\nUsePAM no\n"
                "PermitRootLogin prohibit-password\nPidFile none\nMaxStartups 50\n"
            )
        config += [
            f"Host *\n  User root\n  IdentityFile {self.folder / 'client'}\n  IdentitiesOnly yes",
            f"  UserKnownHostsFile {self.folder / 'known_hosts'}\n  StrictHostKeyChecking yes",
        ]
        (self.folder / "known_hosts").write_text("\n".join(known) + "\n")
        self.ssh_config.write_text("\n".join(config) + "\n")

    def boot(self, name):
        """Powers a host on; returns once its sshd answers."""
        i, netns = self.names.index(name), self._netns(name)
        here, there = f"jv{self.tag}{i}", "lan0"
        sh("ip", "netns", "add", netns)
        if self.relayed:
            self._add(name, self.address[name], here)
            moved = ["name", there, "netns", netns]
            sh("ip", "link", "set", here, "txqueuelen", QUEUE, *moved)
        else:
            sh("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", netns)
            sh("ip", "link", "set", here, "up")
            # Its own for good: who knows the address of before its reboot finds it at once.
            own = f"02:00:00:00:00:{i + 1:02x}"
            sh("ip", "-n", netns, "link", "set", there, "address", own)
        self.heal(name)
        inside = ["ip", "-n", netns]
        sh(*inside, "addr", "add", f"{self.address[name]}/24", "dev", there)
        sh(*inside, "link", "set", there, "up")
        sh(*inside, "link", "set", "lo", "up")
        root = self.folder / "disks" / name
        root.mkdir(exist_ok=True)
        own = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        command = ["ip", "netns", "exec", netns, *own, "bash", "-c", INIT, "init"]
        with open(self.folder / f"{name}.out", "ab") as out:
            self._inits[name] = subprocess.Popen(
                [*command, str(root), name, str(self.folder), self.shared], stdout=out, stderr=out
            )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                socket.create_connection((self.address[name], 22), 1),
            ):
                return
            time.sleep(0.02)
        raise RuntimeError(f"{name} does not boot: {(self.folder / f'{name}.out').read_text()}")

    def cut(self, name):
        """Drops all that would pass on the host's cable."""
        if self.relayed:
            return self.link(name, "*", up=False)
        sh("ip", "link", "set", f"jv{self.tag}{self.names.index(name)}", "nomaster")

    def heal(self, name):
        """Ends a cut."""
        if self.relayed:
            return self.link(name, "*", up=True)
        sh("ip", "link", "set", f"jv{self.tag}{self.names.index(name)}", "master", self.bridge)

    def rate(self, name, mbit):
        """Limits what a host sends and receives, Mbit/s; on a relay, to each other host."""
        if self.relayed:
            return self.link(name, "*", rate_mbit=mbit)
        inside = ["tc", "-n", self._netns(name), "qdisc", "replace", "dev", "lan0", "root", "tbf"]
        limits = ["rate", f"{mbit}mbit", "burst", "64kb", "latency", "50ms"]
        sh(*inside, *limits)
        here = f"jv{self.tag}{self.names.index(name)}"
        sh("tc", "qdisc", "replace", "dev", here, "root", "tbf", *limits)

    def kill(self, name):
        """Power loss: no process says goodbye, and no packet of one gets out."""
        self.cut(name)
        self._remove(name)

    def _remove(self, name):
        init = self._inits.pop(name, None)
        if init:
            init.kill()
            init.wait()
        here = f"jv{self.tag}{self.names.index(name)}"
        subprocess.run(["ip", "link", "del", here], capture_output=True)
        subprocess.run(["ip", "netns", "del", self._netns(name)], capture_output=True)

    def inside(self, name, *argv) -> list[str]:
        """The command that runs argv on a host, its working folder /."""
        children = Path(f"/proc/{self._inits[name].pid}/task/{self._inits[name].pid}/children")
        first = children.read_text().split()[0]  # pid 1 of the host
        return ["nsenter", "-t", first, "-m", "-n", "-p", "-u", "-i", "--wdns=/", *map(str, argv)]

    def run(self, name, *argv) -> str:
        return sh(*self.inside(name, *argv))

    def processes(self, name) -> dict[int, str]:
        """{pid: command line} on a host, without sshd and the looking itself."""
        found = {}
        for line in self.run(name, "ps", "-eo", "pid=,args=").splitlines():
            pid, _, args = line.strip().partition(" ")
            if not args.strip().startswith(("sshd", "/usr/sbin/sshd", "ps -eo", "[")):
                found[int(pid)] = args.strip()
        return found

    def outside(self, name, pid) -> int:
        """The pid that a host's process has out here."""
        init = self.inside(name)[2]
        namespace = os.readlink(f"/proc/{init}/ns/pid")
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(path / "ns" / "pid") != namespace:
                    continue
                fields = (path / "status").read_text().split("NSpid:")[1].splitlines()[0].split()
                if int(fields[-1]) == pid:
                    return int(fields[0])
        raise ProcessLookupError(pid)

    def inventory(self, path, only=None, **fields) -> Path:
        """Writes a hosts.toml of the bed, or of `only` some hosts, for this Python."""
        values = {"python": sys.executable, "interface": "lan0", "workdir": "/root/jaxtrain"}
        lines = ["[defaults]"] + [
            f"{key} = {json.dumps(value)}" for key, value in (values | fields).items()
        ]
        for name in only or self.names:
            lines += ["[[hosts]]", f'name = "{name}"', f'address = "{self.address[name]}"']
        Path(path).write_text("\n".join(lines) + "\n")
        return Path(path)


def main() -> int:
    at = sys.argv.index("--")
    with Bed(int(sys.argv[1]), os.environ.get("BED_SHARED")) as bed:
        hosts = bed.inventory(bed.folder / "hosts.toml")
        env = os.environ | {"BED_HOSTS": str(hosts), "BED_SSH_CONFIG": str(bed.ssh_config)}
        for name in bed.names if (mbit := os.environ.get("BED_MBIT")) else []:
            bed.rate(name, int(mbit))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command's to handle
        return subprocess.run(sys.argv[at + 1 :], env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
