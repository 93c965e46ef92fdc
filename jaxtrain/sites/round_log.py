"""Reports applied rounds: to the ledger, as metrics and, if something changed, as sentences."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxtrain.distributed.broadcast import broadcast_from_process_0
from jaxtrain.distributed.heartbeat import beat
from jaxtrain.sites.decisions import LEADER
from jaxtrain.sites.ledger import Ledger, Round
from jaxtrain.sites.round import Outcome


class RoundLog:
    """What a process reports about its rounds.

    Attributes:
        replay: {(fragment, round): step at which a resumed run has to apply it}.
        note: prints a line.
    """

    def __init__(self):
        self.note: Callable[[str], None] = print
        self.replay: dict[tuple[int, int], int] = {}
        self._ledger: Ledger | None = None
        self._metrics: list[dict[str, float]] = []
        self._absent: dict[str, int] = {}  # site: round since which it has had no part

    def open(self, workdir: Path, applied: Sequence[int], note: Callable[[str], None]) -> None:
        """Records rounds in workdir from now on; reads those to replay.

        Args:
            applied: newest round of each fragment that the run has applied.
        """
        self.note = note

        def open_files() -> tuple[dict[str, int], dict[str, int]]:
            self._ledger = Ledger(workdir, applied)
            lines = self._ledger.replay.values()
            steps = {f"{line.fragment} {line.round}": line.applied_step for line in lines}
            return steps, self._ledger.absent  # JSON has no tuples as keys

        steps, self._absent = broadcast_from_process_0(open_files)
        for key, step in steps.items():
            fragment, number = map(int, key.split())
            self.replay[fragment, number] = step

    def close(self) -> None:
        if self._ledger:
            self._ledger.close()

    def record(self, line: Round) -> None:
        """Writes a line on process 0; prints how it differs from the one that it replays."""
        if self._ledger and (difference := self._ledger.write(line)):
            self.note(difference)

    def add_metrics(self, line: Round) -> None:
        """Adds the metrics of a round that was applied."""
        self._metrics.append(
            {
                "sites/round": line.round,
                "sites/round_s": line.seconds,
                "sites/waited_s": line.waited_s,
                "sites/age_steps": line.applied_step - line.started_step,
                "sites/payload_bytes": sum(line.payload_bytes),
                "sites/wire_bytes": sum(line.wire_bytes),
                "sites/participants": len(line.participants),
            }
        )

    def take_metrics(self) -> list[dict[str, float]]:
        """Returns the metrics of each round that was applied since the last call."""
        metrics, self._metrics = self._metrics, []
        return metrics

    def note_changes(self, names: list[str], round_: int, lost_s: float, outcome: Outcome) -> None:
        """Prints which sites a round left out or admitted."""
        for sentence in self._describe_changes(names, round_, lost_s, outcome):
            self.note(sentence)
        self.show()

    def show(self, waits: str = "") -> None:
        """Shows in the heartbeat what this process waits for, and which sites are left out."""
        absent = [f"without {name} since round {r}" for name, r in self._absent.items()]
        beat.describe_sites("; ".join(filter(None, [waits, *absent])))

    def _describe_changes(
        self, names: list[str], round_: int, lost_s: float, outcome: Outcome
    ) -> Iterator[str]:
        arrived = outcome.arrived
        for site, name in enumerate(names):
            if site in arrived.admitted:
                self._absent.pop(name, None)
                yield (
                    f"site {name} is back: it gets the weights after round {round_} from site "
                    f"{names[LEADER]} and takes part from round {round_ + 1} on"
                )
            elif site in arrived.participants:
                self._absent.pop(name, None)
            elif name not in self._absent:
                self._absent[name] = round_
                yield (
                    f"site {name}, or one of its processes, has sent no code to site "
                    f"{names[LEADER]} for {lost_s:g} s (--sites.lost_s): training goes on without "
                    f"it, from round {round_} on"
                )
