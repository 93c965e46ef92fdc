"""The network between the hosts of a job, as processes on them see it."""

import json
import secrets
import statistics
import threading
import time

from launch.ssh import HostError

CLOCK_ROUNDS = 3
LOOK_S = 90.0  # for a host's first answer; there, what hangs is given up after 20 s: host/facts.py
ANSWER_S = 90.0  # for an answer, above what was ordered; hosts give each other 60 s: host/net.py


class Mesh:
    """A process on every host that listens, and measures towards the others: host/net.py.

    Args:
        look: host -> the request that starts it.

    Attributes:
        found: {host: its first answer or the HostError in place of it}.
    """

    def __init__(self, fleet, look=lambda host: {"op": "net"}):
        self.hosts, self._processes, token = fleet.hosts, {}, secrets.token_hex(16)

        def start(host):
            request = look(host) | {"address": host.address, "token": token}
            process = self._processes[host] = fleet.open(host, request)
            line, in_time = self._read(host, LOOK_S)
            if line:
                return fleet.answer(host, [line], b"", 0)
            if not in_time:
                raise HostError(
                    f"{host.name}: no answer within {LOOK_S:.0f} s: look what hangs there"
                )
            process.wait()
            return fleet.answer(host, [], process.stderr.read(), process.returncode)

        self.found = fleet.everywhere(start)

    def _order(self, host, **order):
        process = self._processes[host]
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:  # _answer says so
            pass

    def _read(self, host, limit_s) -> tuple[bytes, bool]:
        """(a line of a host's or b"", whether it or its end came in time); else it is given up."""
        too_long = threading.Timer(limit_s, self._processes[host].kill)
        too_long.daemon = True
        too_long.start()
        line = self._processes[host].stdout.readline()
        in_time = bool(line) or not too_long.finished.is_set()
        too_long.cancel()
        return line, in_time

    def _answer(self, host, ordered_s=0.0) -> dict:
        line, in_time = self._read(host, ordered_s + ANSWER_S)
        if line:
            return json.loads(line)["ok"]
        late = f"it gave no answer within {ordered_s + ANSWER_S:.0f} s"
        return {"error": "it stopped answering" if in_time else late}

    def look(self, host) -> dict:
        """The host's first answer, with its round trip from here and its clock's lead, s.

        Raises:
            HostError: there is none.
        """
        if isinstance(self.found[host], HostError):
            raise self.found[host]
        rounds = []
        for _ in range(CLOCK_ROUNDS):
            sent = time.time()
            self._order(host, do="time")
            there = self._answer(host)
            back = time.time()
            if "error" in there:
                raise HostError(f"{host.name}: {there['error']}")
            rounds.append((back - sent, there["time"] - (sent + back) / 2))
        rtt_s, skew_s = min(rounds)
        return self.found[host] | {"rtt_s": rtt_s, "skew_s": skew_s}

    def read(self, folder, nonce) -> dict:
        """{host: {"same": whether it reads the first one's nonce}}, which is then removed."""
        for host in self.hosts:
            self._order(host, do="read", folder=folder, nonce=nonce)
        found = {host: self._answer(host) for host in self.hosts}
        self._order(self.hosts[0], do="forget", folder=folder, nonce=nonce)
        self._answer(self.hosts[0])
        return found

    def measure(self, streams, seconds, pings=20, both=False, least_trips=0) -> list[dict]:
        """One dict a directed pair; pairs that share no host are measured at the same time.

        least_trips: traffic that lasts for fewer round trips is left out.
        """
        found, order = [], {"streams": streams, "seconds": seconds, "pings": pings, "both": both}
        for pairs in rounds(len(self.hosts)):
            for i, j in pairs:
                peer = [self.hosts[j].address, self.found[self.hosts[j]]["listens_on"]]
                more = {"peer": peer, "interface": self.hosts[i].interface}
                self._order(self.hosts[i], do="measure", least_trips=least_trips, **order, **more)
            for i, j in pairs:
                names = {"from": self.hosts[i].name, "to": self.hosts[j].name}
                answer = self._answer(self.hosts[i], seconds)
                found.append(names | {"streams": streams, "both": both} | answer)
        return found

    def stream_bytes_per_s(self, pair) -> float:
        """What the buffers of a pair let one TCP stream carry at its round trip.

        Half of a receive buffer is kept for packets' overhead. Source: tcp(7), tcp_adv_win_scale.
        """
        most = lambda name, key: next(
            float((found["sysctls"][key].split() or ["inf"])[-1])
            for host, found in self.found.items()
            if host.name == name
        )
        window = min(most(pair["from"], "tcp_wmem"), most(pair["to"], "tcp_rmem") / 2)
        return window / statistics.median(pair["rtt_s"])

    def close(self):
        for process in self._processes.values():
            with process:
                process.kill()


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """All ordered pairs of `count` hosts, in rounds in which each sends once and receives once."""
    return [[(i, (i + step) % count) for i in range(count)] for step in range(1, count)]
