"""Starts and applies the rounds of an exchange between sites, beside the training loop.

A round of a fragment starts after a step. Threads exchange it (`round.py`) while the loop goes on.
After sites.delay further steps the loop applies the result:

    delay 0        weights = reference: all sites continue from the same bits
    delay above 0  weights = weights + (reference - weights at the round's start)

With sites.blend a site also adds a share of its difference from the sites' mean at the round's
start. The mean of what the sites add is 0.

If a delayed round is not complete by then, training goes on and looks again after each further
period, up to sites.grace of them; then it waits. When a round is applied may thus differ between
sites; what is applied may not. Rounds that could not start in time start as soon as possible, the
last ones after the last step: all sites run the same rounds, and end with the same weights.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np

from jaxtrain.config.run_sections import SitesConfig
from jaxtrain.distributed.broadcast import agree
from jaxtrain.optim.acceleration import settle
from jaxtrain.sites.codec import CODECS
from jaxtrain.sites.decisions import LEADER
from jaxtrain.sites.ends import post_ends
from jaxtrain.sites.errors import SiteLeftOut
from jaxtrain.sites.fragments import rounds_until
from jaxtrain.sites.rejoin import Return, post_state
from jaxtrain.sites.round import POLL_S, Codes, Outer, Pending, Places, run_round, summarize_round
from jaxtrain.sites.round_log import RoundLog

REMIND_S = 30.0  # between two lines about a site that is waited for


class Rounds:
    """The rounds of one process. A context manager: leaving it ends the threads.

    Args:
        cfg: the section `sites`.
        places: the run and its sites.
        exchange: an Exchange, or another object with these methods.
    """

    def __init__(self, cfg: SitesConfig, places: Places, exchange: Codes):
        self.cfg, self.places, self.exchange = cfg, places, exchange
        self.codec = CODECS[cfg.codec]
        self.layouts = [programs.layout for programs in places.programs]
        self.outer: list[Outer] = []
        self.finished_step: int | None = None
        self.ends: list[int] = []  # steps at which the run has ended; it may have been extended
        self.applied: dict[int, list[int]] = {}  # step of a checkpoint: newest round by fragment
        self.took_over = False  # whether the newest after_step took over another site's state
        self.log = RoundLog()
        self._waited_s, self._generation = 0.0, 0
        self._return: Return | None = None  # while the other sites go on without this one
        self._threads = ThreadPoolExecutor(2 * len(self.layouts), "sites")

    def __enter__(self) -> "Rounds":
        return self

    def __exit__(self, *exc) -> None:
        self._generation += 1
        self._threads.shutdown(cancel_futures=True)
        self.log.close()

    def begin(self, state: Any) -> None:
        """Takes the current weights as the reference."""
        for programs in self.places.programs:
            reference = programs.layout.to_host(programs.snapshot(state))
            momentum = np.zeros_like(reference) if self.cfg.momentum else reference[:0]
            error = reference[:0] if self.codec.lossless else np.zeros_like(reference)
            self.outer.append(Outer(reference, momentum, error))

    def applied_rounds(self) -> list[int]:
        """Returns the newest round of each fragment that was applied."""
        return [outer.applied for outer in self.outer]

    def after_step(
        self, state: Any, step: int, stop: Callable[[], Any], pause: Callable[[], Any]
    ) -> tuple[Any, int]:
        """Applies the rounds that are due after a step, and starts those that begin after it.

        A second call for the same step changes nothing, unless the first was interrupted.

        Args:
            state: the training state; donated if a round is applied.
            stop: returns whether to stop waiting. With several processes, all call it equally
                often.
            pause: a context manager within which the process waits for other sites.

        Returns:
            the state and its step: a later one if the others went on without this site.

        Raises:
            NonFiniteDelta: the weights are not finite. Nothing was sent.
            SiteError: another site disagrees, or the exchange has failed.
        """
        self.took_over = False
        state, waiting = self._advance(state, step)
        if waiting or self._return:
            started_s = reminded_s = time.monotonic()
            with pause():
                while (waiting or self._return) and not stop():
                    if self._return:
                        state, step = self._try_to_return(self._return, state, step)
                    else:
                        self._wait_for_news()
                    if not self._return:
                        state, waiting = self._advance(state, step, is_waiting=True)
                    self.log.show(self._describe_wait(waiting))
                    if (waiting or self._return) and time.monotonic() - reminded_s >= REMIND_S:
                        reminded_s = time.monotonic()
                        missing = [self._describe_missing(f) for f in waiting]
                        if self._return:
                            missing = [f"the weights of {self.places.names[LEADER]} are not here"]
                        self.log.note(
                            f"waiting for {reminded_s - started_s:.0f} s after step {step}: "
                            f"{'; '.join(missing)}"
                        )
            self.log.show()
            self._waited_s += time.monotonic() - started_s
        is_complete = not waiting and not self._return
        if step == self.places.steps != self.finished_step and is_complete:
            settled = jax.jit(
                settle, donate_argnums=0, out_shardings=self.places.shardings.opt_state
            )
            state = state._replace(opt_state=settled(state.opt_state))
            post_ends(self.exchange, self.layouts, self.outer)
            self.finished_step = step
            self.ends.append(step)
        return state, step

    def _try_to_return(self, way: Return, state: Any, step: int) -> tuple[Any, int]:
        """Continues from the leader's state if it is here; else waits a little."""
        found = way.find_states()
        if found is None:
            time.sleep(POLL_S / 4)
            return state, step
        self._generation += 1  # ends the threads of rounds that the others do not wait for
        self._return, self.took_over = None, True
        start = max(self._first_step(f, round_) for f, round_ in enumerate(found))
        new_step = max(min(start + self.cfg.delay, self.places.steps), step)
        state, lines = way.take_states(state, step, new_step, found)
        for line in lines:
            self.log.record(line)
        self.log.note(
            f"took over the weights and the outer state of {self.places.names[LEADER]} after "
            f"round {max(found)}; continuing after step {new_step} instead of {step}"
        )
        return state, new_step

    def _advance(self, state: Any, step: int, is_waiting: bool = False) -> tuple[Any, list[int]]:
        """Applies and starts rounds as far as possible without waiting.

        While a site waits for one fragment, its other fragments must go on. Otherwise two sites
        could wait for each other, each holding back what the other needs.

        Returns:
            the state, and the fragments whose rounds must be complete before the next step.
        """
        missing = []
        for f, outer in enumerate(self.outer):
            while True:
                if outer.pending:
                    is_complete, waits = self._look(f, step, is_waiting)
                    if self._return:
                        return state, []
                    if not is_complete:
                        missing += [f] if waits else []
                        break
                    state = self._apply(state, f, step)
                elif outer.round < self._owed(f, step):
                    self._start(f, state, step)
                else:
                    break
        return state, missing

    def _first_step(self, f: int, round_: int) -> int:
        """Returns the step after which a round of a fragment starts, if nothing is late."""
        steps = range(self.places.steps)
        return next((s for s in steps if self._owed(f, s) >= round_), self.places.steps)

    def _owed(self, f: int, step: int) -> int:
        """Returns how many rounds of a fragment belong to the steps up to this one.

        All sites run the same number: a late site catches up, at the latest after the last step.
        """
        steps, period, count = self.places.steps, self.cfg.period, len(self.outer)
        rounds = rounds_until(min(step, steps - 1), period, f, count)
        # Where the run ended before it was extended, it had a round outside of the schedule.
        extra = sum((end - f * period // count) % period != 0 for end in self.ends)
        is_last = step == steps != self.finished_step
        return rounds + extra + is_last

    def _look(self, f: int, step: int, is_waiting: bool) -> tuple[bool, bool]:
        """Returns whether to apply a pending round now, and else whether to wait for it."""
        outer, cfg = self.outer[f], self.cfg
        assert outer.pending is not None
        outcome = outer.pending.outcome
        error = outcome.exception() if outcome.done() else None
        is_left_out = isinstance(error, SiteLeftOut)
        if error and not is_left_out:
            raise error
        late, recorded = step - outer.step - cfg.delay, self.log.replay.get((f, outer.round), 0)
        must_apply = step in (recorded, self.places.steps)
        is_look = late >= 0 and late % cfg.period == 0
        holds_back = is_waiting and outer.round < self._owed(f, step)
        if step < recorded or not (must_apply or is_look or holds_back):
            return False, False
        if cfg.on_loss == "fewer" and not agree(not is_left_out):
            self._return = Return(self.cfg, self.places, self.exchange, self.outer)
            self.log.note(
                f"{self.places.names[LEADER]} went on without this site in round {outer.round} of "
                f"fragment {f}; asking for its weights"
            )
            return False, False
        if agree(outcome.done()):
            return True, False
        waits = must_apply or is_look and (not cfg.delay or late >= cfg.grace * cfg.period)
        if not waits and not is_waiting:
            self.log.note(f"{self._describe_missing(f)}; training goes on")
        return False, waits

    def _wait_for_news(self) -> None:
        """Waits until a round is complete, at most POLL_S."""
        outcomes = [outer.pending.outcome for outer in self.outer if outer.pending]
        running = [outcome for outcome in outcomes if not outcome.done()]
        if running:
            wait(running, POLL_S, FIRST_COMPLETED)
        else:  # other processes of this site are not as far
            time.sleep(POLL_S / 20)

    def _start(self, f: int, state: Any, step: int) -> None:
        """Starts a round: takes a snapshot on the devices; threads do all that follows."""
        outer = self.outer[f]
        # A site that catches up has rounds without steps: their weight is that of one token.
        outer.tokens = max((step - outer.step) * self.places.step_tokens, 1)
        outer.round, outer.step = outer.round + 1, step
        snapshot = self.places.programs[f].snapshot(state)
        self.exchange_weights(f, self._threads.submit(self.layouts[f].to_host, snapshot))

    def exchange_weights(self, f: int, weights: Future) -> None:
        """Starts the thread of a fragment's newest round, given the weights on the host."""
        generation = self._generation
        is_open = lambda: generation == self._generation
        args = self.cfg, self.places, self.layouts[f], self.exchange, is_open
        run = functools.partial(run_round, *args, f, dataclasses.replace(self.outer[f]))
        outcome = self._threads.submit(lambda: run(weights.result()))
        self.outer[f].pending = Pending(weights, outcome)

    def _describe_wait(self, waiting: list[int]) -> str:
        """Returns what the training waits for in a few words; "" if for no other site."""
        if self._return:
            return f"left out, waits for the weights of {self.places.names[LEADER]}"
        for f in waiting:
            if sites := self.exchange.missing(f, round_ := self.outer[f].round):
                return (
                    f"waits for round {round_} of {', '.join(self.places.names[k] for k in sites)}"
                )
        return ""

    def _describe_missing(self, f: int) -> str:
        round_ = self.outer[f].round
        names = [self.places.names[site] for site in self.exchange.missing(f, round_)]
        what = f"nothing complete has come from {', '.join(names)}" if names else "being computed"
        return f"round {round_} of fragment {f}: {what}"

    def _apply(self, state: Any, f: int, step: int) -> Any:
        """Applies a complete round."""
        outer, layout = self.outer[f], self.layouts[f]
        assert outer.pending is not None
        pending, outer.pending = outer.pending, None
        outcome = pending.outcome.result()
        line = summarize_round(self.places, layout, f, outer, outcome, step, self._waited_s)
        self.log.record(line)  # before the state changes: a checkpoint never knows more than it
        self.log.add_metrics(line)
        self._waited_s = 0.0
        self.log.note_changes(self.places.names, outer.round, self.cfg.lost_s, outcome)
        if outcome.arrived.admitted and self.places.site == LEADER:
            post_state(self.exchange, layout, f, outer.round, outcome)
        outer.reference, outer.momentum, outer.error = outcome[:3]
        vector, mode = outer.reference, "replace" if step == outer.step else "move"
        if mode == "move":
            vector = vector - pending.weights.result()
            if outcome.kept is not None:
                vector += outcome.kept
        elif step == self.places.steps and outer.round == self._owed(f, step):
            mode = "settle"
        return self.places.programs[f].apply[mode](state, layout.to_devices(vector))
