"""Starts and applies the rounds of an exchange between sites, beside the training loop.

A round of a fragment starts after a step. Threads exchange it (`round.py`) while the loop goes on.
After sites.delay further steps the loop applies
the result:

    delay 0        weights = reference: all sites continue from the same bits
    delay above 0  weights = weights + (reference - weights at the round's start)

If a delayed round is not complete by then, training goes on and looks again after each further
period, up to sites.grace of them; then it waits. When a round is applied may thus differ between
sites; what is applied may not. After the last step all sites finish the same number of rounds, and
end with the same weights.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.config.run_sections import SitesConfig
from jaxtrain.distributed.broadcast import broadcast_from_process_0
from jaxtrain.optim.acceleration import settle
from jaxtrain.sites import BLOCK
from jaxtrain.sites.codec import CODECS
from jaxtrain.sites.fragments import DeviceLayout, build_apply, build_snapshot, starts_after
from jaxtrain.sites.ledger import Ledger, Round
from jaxtrain.sites.round import POLL_S, Codes, Outer, Pending, Places, run_round, summarize_round

REMIND_S = 30.0  # between two lines about a site that is waited for


class Rounds:
    """The rounds of one process. A context manager: leaving it ends the threads.

    Args:
        cfg: the section `sites`.
        places: the run and its sites.
        exchange: an Exchange, or another object with these methods.
    """

    def __init__(
        self,
        cfg: SitesConfig,
        places: Places,
        exchange: Codes,
    ):
        self.cfg, self.places, self.exchange = cfg, places, exchange
        self.codec = CODECS[cfg.codec]
        self.layouts = [DeviceLayout(fragment, places.mesh) for fragment in places.fragments]
        self.snapshots = [build_snapshot(layout) for layout in self.layouts]
        self.outer: list[Outer] = []
        self.finished_step: int | None = None
        self.applied: dict[int, list[int]] = {}  # step of a checkpoint: newest round by fragment
        self._ledger: Ledger | None = None
        self._note: Callable[[str], None] = print
        self._applies: dict[tuple[int, str], Callable] = {}
        self._replay: dict[tuple[int, int], int] = {}
        self._metrics: list[dict[str, float]] = []
        self._waited_s, self._closing = 0.0, False
        self._threads = ThreadPoolExecutor(2 * len(self.layouts), "sites")

    def __enter__(self) -> "Rounds":
        return self

    def __exit__(self, *exc) -> None:
        self._closing = True
        self._threads.shutdown(cancel_futures=True)
        if self._ledger:
            self._ledger.close()

    def begin(self, state: Any) -> None:
        """Takes the weights of step 0 as the reference."""
        for layout, snapshot in zip(self.layouts, self.snapshots, strict=True):
            reference = layout.to_host(snapshot(state))
            momentum = np.zeros_like(reference) if self.cfg.momentum else reference[:0]
            error = reference[:0] if self.codec.lossless else np.zeros_like(reference)
            self.outer.append(Outer(reference, momentum, error))

    def open_ledger(self, workdir: Path, resume_step: int, note: Callable[[str], None]) -> None:
        """Records rounds in workdir from now on, and replays those recorded after `resume_step`.

        Args:
            note: prints a line.
        """
        self._note = note

        def open_files() -> dict[str, int]:
            self._ledger = Ledger(workdir, resume_step)
            lines = self._ledger.replay.values()
            return {f"{line.fragment} {line.round}": line.applied_step for line in lines}

        steps = broadcast_from_process_0(open_files)  # JSON has no tuples as keys
        self._replay = {tuple(map(int, key.split())): step for key, step in steps.items()}

    def _record(self, line: Round) -> None:
        """Writes a line on process 0; prints how it differs from the one that it replays."""
        if self._ledger and (difference := self._ledger.write(line)):
            self._note(difference)

    def describe(self) -> Iterator[str]:
        """Yields sentences on the sites, what they exchange and when."""
        cfg, names = self.cfg, self.places.names
        yield f"{names[self.places.site]}, of {', '.join(names)}"
        elements = [fragment.elements for fragment in self.places.fragments]
        size = sum(self.codec.code_bytes(f.blocks * BLOCK) for f in self.places.fragments)
        parts = f" in {len(elements)} fragments" if len(elements) > 1 else ""
        use = f"used {cfg.delay} steps later" if cfg.delay else "waited for"
        yield (
            f"every {cfg.period} steps {sum(elements):,} parameters{parts}, {cfg.codec}: "
            f"{size:,} bytes to each other site, {use}"
        )
        if self._replay:
            yield f"{len(self._replay)} recorded rounds are replayed at their recorded steps"

    def after_step(
        self, state: Any, step: int, stop: Callable[[], Any], pause: Callable[[], Any]
    ) -> Any:
        """Applies the rounds that are due after a step, and starts those that begin after it.

        A second call for the same step changes nothing, unless the first was interrupted.

        Args:
            state: the training state; donated if a round is applied.
            stop: returns whether to stop waiting. With several processes, all call it equally
                often.
            pause: a context manager within which the process waits for other sites.

        Raises:
            NonFiniteDelta: the weights are not finite. Nothing was sent.
            SiteError: another site disagrees, or the exchange has failed.
        """
        for f, outer in enumerate(self.outer):
            state = self._apply_if_due(state, f, step, stop, pause)
            starts = starts_after(step, self.cfg.period, f, len(self.outer))
            if starts and outer.step < step < self.places.steps and not outer.pending:
                self._start(f, state, step)
                state = self._apply_if_due(state, f, step, stop, pause)
        if step == self.places.steps != self.finished_step:
            state = self._finish(state, stop, pause)
        return state

    def take_metrics(self) -> list[dict[str, float]]:
        """Returns the metrics of each round that was applied since the last call."""
        metrics, self._metrics = self._metrics, []
        return metrics

    def _start(self, f: int, state: Any, step: int) -> None:
        """Starts a round: takes a snapshot on the devices; threads do all that follows."""
        outer = self.outer[f]
        # Late sites end with rounds after no further step; weights are then about equal anyway.
        outer.tokens = max((step - outer.step) * self.places.step_tokens, 1)
        outer.round, outer.step = outer.round + 1, step
        snapshot = self.snapshots[f](state)
        self.exchange_weights(f, self._threads.submit(self.layouts[f].to_host, snapshot))

    def exchange_weights(self, f: int, weights: Future) -> None:
        """Starts the thread of a fragment's newest round, given the weights on the host."""
        args = self.cfg, self.places, self.layouts[f], self.exchange, self._is_open
        run = functools.partial(run_round, *args, f, dataclasses.replace(self.outer[f]))
        outcome = self._threads.submit(lambda: run(weights.result()))
        self.outer[f].pending = Pending(weights, outcome)

    def _is_open(self) -> bool:
        return not self._closing

    def _apply_if_due(self, state, f: int, step: int, stop, pause) -> Any:
        """Applies a fragment's pending round if it is due and complete, or waits for it."""
        outer, cfg = self.outer[f], self.cfg
        if outer.pending is None:
            return state
        if outer.pending.outcome.done():
            outer.pending.outcome.result()  # raises the error of its thread
        late = step - outer.step - cfg.delay
        recorded = self._replay.get((f, outer.round), 0)
        if step < recorded:  # before a restart, it was applied later
            return state
        is_look = late >= 0 and late % cfg.period == 0
        if not is_look and step != recorded:
            return state
        waits = not cfg.delay or late >= cfg.grace * cfg.period or step == recorded
        if self._is_complete(f, waits, stop, pause):
            return self._apply(state, f, step, "replace" if step == outer.step else "move")
        if not waits:
            self._note(
                f"round {outer.round} of fragment {f} is late: {self._describe_missing(f)}; "
                "training goes on"
            )
        return state

    def _is_complete(self, f: int, waits: bool, stop, pause) -> bool:
        """Returns whether a pending round is complete on all processes of this site."""
        outer = self.outer[f]
        assert outer.pending is not None
        outcome, started_s = outer.pending.outcome, time.monotonic()
        if agree(outcome.done()):
            return True
        if not waits:
            return False
        reminded_s = started_s
        with pause():
            while not agree(_is_done(outcome)) and not stop():
                if time.monotonic() - reminded_s >= REMIND_S:
                    reminded_s = time.monotonic()
                    self._note(
                        f"waiting for round {outer.round} of fragment {f} for "
                        f"{reminded_s - started_s:.0f} s: {self._describe_missing(f)}"
                    )
        self._waited_s += time.monotonic() - started_s
        return agree(outcome.done())

    def _describe_missing(self, f: int) -> str:
        missing = self.exchange.missing(f, self.outer[f].round)
        names = ", ".join(self.places.names[site] for site in missing)
        return f"nothing complete has come from {names}" if names else "it is being computed"

    def _apply(self, state: Any, f: int, step: int, mode: str) -> Any:
        """Applies a complete round; see build_apply for the modes."""
        outer, layout = self.outer[f], self.layouts[f]
        assert outer.pending is not None
        pending, outer.pending = outer.pending, None
        outcome = pending.outcome.result()
        line = summarize_round(self.places, layout, f, outer, outcome, step, self._waited_s)
        self._record(line)  # before the state changes: a checkpoint never knows more than it
        metrics = {"sites/round": outer.round, "sites/round_s": line.seconds}
        metrics |= {"sites/waited_s": self._waited_s, "sites/age_steps": step - outer.step}
        metrics |= {"sites/payload_bytes": sum(line.payload_bytes)}
        metrics |= {"sites/wire_bytes": sum(line.wire_bytes)}
        self._metrics.append(metrics)
        self._waited_s = 0.0
        outer.reference, outer.momentum, outer.error = outcome[:3]
        vector = outer.reference
        if mode == "move":
            vector = vector - pending.weights.result()
        if (f, mode) not in self._applies:
            self._applies[f, mode] = build_apply(layout, mode, self.places.shardings)
        return self._applies[f, mode](state, layout.to_devices(vector))

    def _finish(self, state: Any, stop, pause) -> Any:
        """Ends the run with the same number of rounds at all sites, and the same weights.

        A site that was late started fewer rounds than others, so that all first tell their counts.
        """
        key = self.places.steps // self.cfg.period
        for f, outer in enumerate(self.outer):
            content = str(outer.round).encode()
            links = range(len(self.exchange.links))
            self.exchange.post("count", f, key, dict.fromkeys(links, content))
        counts = [self._gather_counts(f, key, stop, pause) for f in range(len(self.outer))]
        for f, (outer, others) in enumerate(zip(self.outer, counts, strict=True)):
            if others is None:
                return state
            last = max([outer.round, *others]) + 1
            while outer.round < last or outer.pending:
                if not outer.pending:
                    self._start(f, state, self.places.steps)
                if not self._is_complete(f, True, stop, pause):
                    return state
                mode = "settle" if outer.round == last else "move"
                state = self._apply(state, f, self.places.steps, mode)
        shardings = self.places.shardings.opt_state
        settled = jax.jit(settle, donate_argnums=0, out_shardings=shardings)(state.opt_state)
        self.finished_step = self.places.steps
        return state._replace(opt_state=settled)

    def _gather_counts(self, f: int, key: int, stop, pause) -> list[int] | None:
        """Waits for the other sites' numbers of rounds; returns None if interrupted."""
        others = [k for k in range(len(self.places.names)) if k != self.places.site]
        counts = lambda: [self.exchange.take("count", f, key, site) for site in others]
        with pause():
            while not agree(None not in (found := counts())):
                if stop():
                    return None
                time.sleep(POLL_S / 20)
        return [int(next(iter(by_link.values()))) for by_link in found if by_link]


def agree(value: bool) -> bool:
    """Returns whether `value` is true on all processes of this site."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.int32(value))))


def _is_done(outcome: Future) -> bool:
    """Waits a while for a round; returns whether it is complete."""
    try:
        outcome.exception(POLL_S)
    except TimeoutError:
        return False
    return True
