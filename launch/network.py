"""Examines the hosts and the network between them, through one agent process on every host."""

import json
import secrets
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from launch.answers import COUNT, SECONDS, Range, check, mismatch
from launch.host_process import HostProcess
from launch.inventory import Host
from launch.ssh import HostError, SshClient
from launch.terminal import indented

CLOCK_ROUNDS = 3
# Time limit of a host's first answer. The host abandons a hanging call after 20 s: host/facts.py.
FIRST_ANSWER_S = 90.0
# Time limit of an answer on top of the seconds of traffic. Agents wait 60 s for each other:
# see host/agent.py.
ANSWER_S = 90.0
Pair = dict[str, Any]  # what was measured from one host to another
Place = tuple[Host, str, int]  # a host, and an address and port at which it listens
FIRST = {"listens_on": (Range(int, 1, 65_535), None)}
RTTS = [Range(float, 1e-9, 1e9), 1]  # s; divides a buffer's size
MEASURED = {"rtt_s": RTTS}
TRAFFIC = MEASURED | {  # if traffic was sent
    "seconds": SECONDS,
    "bytes": COUNT,
    "bytes_per_s": Range(float, 0, 1e15),
    "mtu": (Range(int, 68, 1 << 20), None),  # at least IPv4's; RFC 791
    "wire_bytes": [COUNT, 2],
}


class NetworkAgents:
    """A process on every host that executes orders, see launch/host/agent.py.

    A context manager, which kills the agents at its end.

    Args:
        first_request: returns the request that starts a host's agent.
        first_shape: what its first answer must contain, see launch.answers.

    Attributes:
        first_answers: {host: its first answer, or the HostError in its place}.
    """

    def __init__(
        self,
        client: SshClient,
        first_request: Callable[[Host], dict[str, Any]] = lambda host: {"op": "net"},
        first_shape: dict[str, Any] = FIRST,
    ):
        self.hosts, token = client.hosts, secrets.token_hex(16)
        self._processes: dict[Host, HostProcess] = {}

        def start_agent(host: Host) -> dict[str, Any]:
            request = first_request(host) | {"address": host.address, "token": token}
            process = self._processes[host] = client.start(host, request)
            return check(host, client.read_answer(host, process, FIRST_ANSWER_S), first_shape)

        self.first_answers: dict[Host, Any] = client.map(start_agent)

    def __enter__(self) -> "NetworkAgents":
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.close()

    def _send_order(self, host: Host, **order: Any) -> None:
        # If the host no longer reads, _read_answer reports it.
        self._processes[host].send(json.dumps(order).encode() + b"\n")

    def _read_answer(self, host: Host, ordered_s: float = 0.0) -> dict[str, Any]:
        limit_s = ordered_s + ANSWER_S
        try:
            line = self._processes[host].readline(limit_s)
        except TimeoutError:
            return {"error": f"it gave no answer within {limit_s:.0f} s"}
        if not line:
            return {"error": "it stopped answering"}
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        value = answer.get("ok") if isinstance(answer, dict) else None
        if isinstance(value, dict) and "error" not in value:
            return value
        source = value or answer
        error = source.get("error") if isinstance(source, dict) else None
        return {"error": indented(str(error or "its answer has no meaning"))}

    def answer_with_clock(self, host: Host) -> dict[str, Any]:
        """Returns the host's first answer, its round trip and its clock's lead over ours, in s.

        Raises:
            HostError: there is no answer.
        """
        answer = self.first_answers[host]
        if isinstance(answer, HostError):
            raise answer
        samples = []
        for _ in range(CLOCK_ROUNDS):
            sent = time.time()
            self._send_order(host, do="time")
            clock = self._read_answer(host)
            received = time.time()
            if "error" in clock:
                raise HostError(f"{host.name}: {clock['error']}")
            check(host, clock, {"time": Range(float, 0, 1e12)})
            samples.append((received - sent, clock["time"] - (sent + received) / 2))
        rtt_s, skew_s = min(samples)  # the shortest round trip bounds the skew best
        return answer | {"rtt_s": rtt_s, "skew_s": skew_s}

    def listen(self, places: Iterable[Place]) -> dict[Place, str]:
        """Lets hosts listen at further places; returns {place: reason} of those that cannot."""
        places = list(places)
        orders = [(host, {"do": "listen", "address": a, "port": p}) for host, a, p in places]
        answers = zip(places, self.execute(orders), strict=True)
        return {place: answer["error"] for place, answer in answers if "error" in answer}

    def execute(self, orders: Sequence[tuple[Host, Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Returns the answer to each order, or {"error": text}. Hosts work at the same time."""
        for host, order in orders:
            self._send_order(host, **order)
        return [self._read_answer(host) for host, _ in orders]

    def read_nonce(self, folder: str, nonce: str) -> dict[Host, dict[str, Any]]:
        """Returns {host: {"same": whether it reads the first host's nonce}}; deletes the nonce."""
        for host in self.hosts:
            self._send_order(host, do="read", folder=folder, nonce=nonce)
        answers = {host: self._read_answer(host) for host in self.hosts}
        self._send_order(self.hosts[0], do="forget", folder=folder, nonce=nonce)
        self._read_answer(self.hosts[0])
        return answers

    def measure(
        self,
        streams: int,
        seconds: float,
        pings: int = 20,
        both: bool = False,
        least_trips: float = 0,
        places: Mapping[Host, tuple[str, int]] | None = None,
    ) -> list[Pair]:
        """Measures every directed pair, in rounds in which each host sends once and receives once.

        Args:
            streams: number of simultaneous TCP streams.
            seconds: duration of the traffic.
            both: send in both directions at once.
            least_trips: no traffic is sent if it would last for fewer round trips than this.
            places: {host: where it listens for other sites}. Then only pairs of hosts at different
                sites are measured, and the host that comes first connects.

        Returns:
            A dict per pair, with "from", "to" and either "error" or the figures.
        """
        pairs = []
        far = lambda i, j: i < j and self.hosts[i].site != self.hosts[j].site
        for round_pairs in rounds(len(self.hosts)):
            round_pairs = [(i, j) for i, j in round_pairs if not places or far(i, j)]
            for i, j in round_pairs:
                to = self.hosts[j]
                near = (to.address, self.first_answers[to]["listens_on"])
                self._send_order(
                    self.hosts[i],
                    do="measure",
                    peer=places[to] if places else near,
                    interface=self.hosts[i].interface,
                    streams=streams,
                    seconds=seconds,
                    pings=pings,
                    both=both,
                    least_trips=least_trips,
                )
            for i, j in round_pairs:
                names = {"from": self.hosts[i].name, "to": self.hosts[j].name}
                answer = self._read_answer(self.hosts[i], seconds)
                must_send = seconds > 0 and not least_trips
                shape = TRAFFIC if must_send or "bytes_per_s" in answer else MEASURED
                error = answer.get("error") or mismatch(answer, shape, "its answer")
                figures = {"error": error} if error else {key: answer.get(key) for key in shape}
                pairs.append(names | {"streams": streams, "both": both} | figures)
        return pairs

    def stream_limit_bytes_per_s(self, pair: Pair) -> float:
        """Returns the highest rate of one TCP stream with the pair's buffers and round trip.

        Half of a receive buffer is reserved for overhead. Source: tcp(7), tcp_adv_win_scale.
        """

        def largest_buffer(name: str, sysctl: str) -> float:
            answers = {host.name: answer for host, answer in self.first_answers.items()}
            values = answers[name]["sysctls"][sysctl].split()  # least, default, largest
            return float(values[-1]) if values else float("inf")

        window = min(
            largest_buffer(pair["from"], "tcp_wmem"), largest_buffer(pair["to"], "tcp_rmem") / 2
        )
        return window / statistics.median(pair["rtt_s"])


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Returns all ordered pairs of hosts, in rounds in which each sends once and receives once."""
    return [[(i, (i + step) % count) for i in range(count)] for step in range(1, count)]
