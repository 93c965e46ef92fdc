"""A test bed: several hosts on one machine, with namespaces, real sshd and real links.

    python -m tests.bed 3 -- COMMAND     runs COMMAND with BED_HOSTS and BED_SSH_CONFIG set

Each host has its own network, mount, pid and uts namespace, an overlay in memory as its root, and
an sshd with its own key. The hosts and the operator (this process) are on one bridge, or on a relay
(tests/relay.py) whose links can have a delay. A link that is cut drops packets silently, as a cable
does. A host that is killed loses its link first, so that its kernel cannot close connections. Needs
root on Linux.
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
from collections.abc import Iterator
from pathlib import Path

import relay

OPERATOR = "operator"  # the operator's name on a relay
NETWORK, NETWORKS = "10.77", 250  # beds have NETWORK.0.0/24 and the following ones
QUEUE = "5000"  # packets that a device queues until the relay reads them
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
# A login shell that prints: the launcher must find its answers behind this.
printf '%s\n' 'echo hello from .bashrc' 'echo "{\"ok\": 3}"' > /root/.bashrc
umount -l /old
exec /usr/sbin/sshd -D -e -f "$3/sshd_config.$2"
"""


def available(relayed: bool = False) -> str:
    """Returns why no test bed can run on this machine; "" if one can."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return "a bed of hosts needs root on Linux"
    for tool in ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "/usr/sbin/sshd"):
        if shutil.which(tool) is None:
            return f"a bed of hosts needs {tool}"
    if relayed and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "a relayed bed needs /dev/net/tun"
    name = f"jtry{secrets.token_hex(2)}"
    added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if added.returncode:
        return f"a bed of hosts needs network namespaces: {added.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


def check_output(*argv: str) -> str:
    """Runs a command that must succeed; returns its output."""
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def own_network() -> Iterator[str]:
    """Yields the first three numbers of a /24 network that no other bed of this machine has."""
    for number in secrets.SystemRandom().sample(range(NETWORKS), NETWORKS):
        network = f"{NETWORK}.{number}"
        with socket.socket(socket.AF_UNIX) as owner:
            try:
                owner.bind(f"\0jaxtrain-bed-{network}")  # the kernel frees it with the process
            except OSError:
                continue
            if f" {network}." not in check_output("ip", "-oneline", "-4", "addr"):
                yield network
                return
    raise RuntimeError(f"all {NETWORKS} networks of beds are in use: `ip link` lists jb*")


class Bed:
    """`count` hosts, h0 to h{count-1}. A context manager.

    Args:
        shared: a folder that all hosts see as /mnt/shared, or None.
        relayed: connect the hosts by a relay, see `link`, instead of a bridge.

    Attributes:
        ssh_config: a file for `ssh -F`.
        address: {host: IP}.
        folder: contains keys and settings.
    """

    def __init__(self, count: int = 3, shared: Path | str | None = None, relayed: bool = False):
        self.names = [f"h{i}" for i in range(count)]
        self.tag, self.address = secrets.token_hex(2), {}
        self.shared, self._inits, self.relayed = str(shared or ""), {}, relayed

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.net = stack.enter_context(own_network())
            self.address |= {name: f"{self.net}.{i + 1}" for i, name in enumerate(self.names)}
            self.folder = Path(tempfile.mkdtemp(prefix="jaxtrain-bed-"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            (self.folder / "disks").mkdir()  # they survive a power loss
            check_output("mount", "-t", "tmpfs", "tmpfs", str(self.folder / "disks"))
            stack.callback(check_output, "umount", "-l", str(self.folder / "disks"))
            self.ssh_config = self.folder / "ssh_config"
            self._write_settings()
            if self.relayed:
                self._start_relay(stack)
            else:
                check_output("ip", "link", "add", self.bridge, "type", "bridge")
                stack.callback(check_output, "ip", "link", "del", self.bridge)
            check_output("ip", "addr", "add", f"{self.net}.254/24", "dev", self.bridge)
            check_output("ip", "link", "set", self.bridge, "up")
            for name in self.names:
                stack.callback(self._remove, name)
                self.boot(name)
            self._close = stack.pop_all()
        return self

    def __exit__(self, *exc):
        self._close.close()

    @property
    def bridge(self) -> str:
        """Returns the operator's interface: the bridge, or a device of the relay."""
        return f"jb{self.tag}"

    def _start_relay(self, stack):
        self._socket = self.folder / "relay"
        command = [sys.executable, relay.__file__, str(self._socket)]
        program = subprocess.Popen(command, stdout=subprocess.PIPE)
        stack.callback(program.wait)
        stack.callback(program.kill)  # its devices go with it
        assert program.stdout
        with program.stdout as output:
            assert output.readline(), "the relay does not start"
        self._add(OPERATOR, f"{self.net}.254", self.bridge)
        check_output("ip", "link", "set", self.bridge, "txqueuelen", QUEUE)

    def _add(self, name, address, device):
        request = {"do": "add", "name": name, "address": address, "device": device}
        relay.ask(self._socket, request)

    def link(self, a, b, **values):
        """Changes both directions between two hosts (`*`: all) of a relayed bed, see relay.Link."""
        for source, to in ((a, b), (b, a)):
            relay.ask(self._socket, {"do": "link", "from": source, "to": to} | values)

    def traffic(self) -> dict:
        """Returns {"h0 > h1": the relay's counters}: packets, segments, bytes, dropped, lost."""
        return relay.ask(self._socket, {"do": "stats"})

    def _netns(self, name):
        return f"j{self.tag}{name}"

    def _write_settings(self):
        for key in ("client", *self.names):
            check_output(
                "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)
            )
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

    def boot(self, name: str) -> None:
        """Powers a host on; returns when its sshd answers."""
        i, netns = self.names.index(name), self._netns(name)
        here, there = f"jv{self.tag}{i}", "lan0"
        check_output("ip", "netns", "add", netns)
        if self.relayed:
            self._add(name, self.address[name], here)
            moved = ["name", there, "netns", netns]
            check_output("ip", "link", "set", here, "txqueuelen", QUEUE, *moved)
        else:
            check_output(
                "ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", netns
            )
            check_output("ip", "link", "set", here, "up")
            # The same MAC address after a reboot, so that the others' ARP caches stay valid.
            mac = f"02:00:00:00:00:{i + 1:02x}"
            check_output("ip", "-n", netns, "link", "set", there, "address", mac)
        self.heal(name)
        inside = ["ip", "-n", netns]
        check_output(*inside, "addr", "add", f"{self.address[name]}/24", "dev", there)
        check_output(*inside, "link", "set", there, "up")
        check_output(*inside, "link", "set", "lo", "up")
        root = self.folder / "disks" / name
        root.mkdir(exist_ok=True)
        namespaces = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        command = ["ip", "netns", "exec", netns, *namespaces, "bash", "-c", INIT, "init"]
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

    def cut(self, name: str) -> None:
        """Drops all packets from and to a host."""
        if self.relayed:
            return self.link(name, "*", up=False)
        check_output("ip", "link", "set", f"jv{self.tag}{self.names.index(name)}", "nomaster")

    def heal(self, name: str) -> None:
        """Reconnects a host that was cut."""
        if self.relayed:
            return self.link(name, "*", up=True)
        check_output(
            "ip", "link", "set", f"jv{self.tag}{self.names.index(name)}", "master", self.bridge
        )

    def rate(self, name: str, mbit: int) -> None:
        """Limits what a host sends and receives, in Mbit/s; on a relay, per other host."""
        if self.relayed:
            return self.link(name, "*", rate_mbit=mbit)
        inside = ["tc", "-n", self._netns(name), "qdisc", "replace", "dev", "lan0", "root", "tbf"]
        limits = ["rate", f"{mbit}mbit", "burst", "64kb", "latency", "50ms"]
        check_output(*inside, *limits)
        here = f"jv{self.tag}{self.names.index(name)}"
        check_output("tc", "qdisc", "replace", "dev", here, "root", "tbf", *limits)

    def kill(self, name: str) -> None:
        """Simulates a power loss: all processes end, without sending another packet."""
        self.cut(name)
        self._remove(name)

    def reboot(self, name: str, away_s: float) -> None:
        """Ends all processes of a host, whose kernel closes their connections, then boots it."""
        for pid in self.processes(name):
            subprocess.run(self.inside(name, "kill", "-KILL", pid), capture_output=True)
        time.sleep(1.0)  # for the packets that close the connections
        self._remove(name)
        time.sleep(away_s - 1.0)
        self.boot(name)

    def _remove(self, name):
        init = self._inits.pop(name, None)
        if init:
            init.kill()
            init.wait()
        here = f"jv{self.tag}{self.names.index(name)}"
        subprocess.run(["ip", "link", "del", here], capture_output=True)
        subprocess.run(["ip", "netns", "del", self._netns(name)], capture_output=True)

    def inside(self, name: str, *argv: object) -> list[str]:
        """Returns the command that runs argv on a host, in the folder /."""
        children = Path(f"/proc/{self._inits[name].pid}/task/{self._inits[name].pid}/children")
        first = children.read_text().split()[0]  # pid 1 of the host
        return ["nsenter", "-t", first, "-m", "-n", "-p", "-u", "-i", "--wdns=/", *map(str, argv)]

    def run(self, name: str, *argv: object) -> str:
        """Runs a command on a host that must succeed; returns its output."""
        return check_output(*self.inside(name, *argv))

    def processes(self, name: str) -> dict[int, str]:
        """Returns {pid: command line} of a host's processes, without sshd and ps."""
        command_of = {}
        for line in self.run(name, "ps", "-eo", "pid=,args=").splitlines():
            pid, _, args = line.strip().partition(" ")
            if not args.strip().startswith(("sshd", "/usr/sbin/sshd", "ps -eo", "[")):
                command_of[int(pid)] = args.strip()
        return command_of

    def outside(self, name: str, pid: int) -> int:
        """Returns the pid outside the bed, in this process's namespace, of a host's process."""
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

    def inventory(self, path: Path, only: list[str] | None = None, **fields: object) -> Path:
        """Writes a hosts.toml that uses this Python, for all hosts or `only` some."""
        values = {"python": sys.executable, "interface": "lan0", "workdir": "/root/jaxtrain"}
        lines = ["[defaults]"] + [
            f"{key} = {json.dumps(value)}" for key, value in (values | fields).items()
        ]
        for name in only or self.names:
            lines += ["[[hosts]]", f'name = "{name}"', f'address = "{self.address[name]}"']
        Path(path).write_text("\n".join(lines) + "\n")
        return Path(path)


def main() -> int:
    separator = sys.argv.index("--")
    with Bed(int(sys.argv[1]), os.environ.get("BED_SHARED")) as bed:
        hosts = bed.inventory(bed.folder / "hosts.toml")
        env = os.environ | {"BED_HOSTS": str(hosts), "BED_SSH_CONFIG": str(bed.ssh_config)}
        if mbit := os.environ.get("BED_MBIT"):
            for name in bed.names:
                bed.rate(name, int(mbit))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command handles it
        return subprocess.run(sys.argv[separator + 1 :], env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
