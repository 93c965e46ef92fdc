"""Brings a site that was left out back into the job.

The site asks the leader, which admits it in its next decision on each fragment. When the leader has
applied that round, it sends its reference and momentum, float32. The site continues from them, at
the step at which the round is used, so that it is level with the others again: it skips steps and
their batches. Its optimizer keeps its momentum; the errors of earlier codes are dropped.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain.config.run_sections import SitesConfig
from jaxtrain.distributed.broadcast import gather_texts
from jaxtrain.sites.checksum import combine_crc32
from jaxtrain.sites.decisions import LEADER, Decision
from jaxtrain.sites.ledger import Round
from jaxtrain.sites.round import Codes, Outcome, Outer, Places, part_of_link


def post_state(exchange: Codes, layout: Any, f: int, round_: int, outcome: Outcome) -> None:
    """Sends the leader's outer state after a round to the sites that the round admits."""
    contents = {}
    for i, link in enumerate(exchange.links):
        if link.site in outcome.arrived.admitted:
            part = part_of_link(layout, f, link)
            contents[i] = outcome.reference[part].tobytes() + outcome.momentum[part].tobytes()
    exchange.post("state", f, round_, contents)


def find_admission(decisions: Mapping[int, Decision], outer: Outer, site: int) -> int | None:
    """Returns the round after which the leader sends this site its state; None if it must ask.

    Args:
        decisions: {round: decision} of a fragment, as far as they are known here.
        outer: the fragment's state at this site.
        site: this site.
    """
    left_out = [
        number
        for number, decision in decisions.items()
        if number > outer.applied and site not in decision.participants
    ]
    newest = max(left_out, default=None)
    return newest if newest is not None and site in decisions[newest].admitted else None


class Return:
    """A site's way back, from when it learns that it was left out."""

    def __init__(self, cfg: SitesConfig, places: Places, exchange: Codes, outer: list[Outer]):
        self._places, self._exchange, self._outer = places, exchange, outer
        self._vectors = 2 if cfg.momentum else 1  # in a state: the reference, and the momentum
        self._asked: set[tuple[int, int]] = set()

    def find_states(self) -> list[int] | None:
        """Returns the round of each fragment whose state is here; None if one is not here yet.

        Asks the leader for what it has not promised. All processes of the site must call it, and
        get the same answer.
        """
        exchange, site = self._exchange, self._places.site
        found = []
        for f, outer in enumerate(self._outer):
            decisions = exchange.decisions(f)
            admission = find_admission(decisions, outer, site)
            if admission is None:
                self._ask(f, self._newest_round(f, outer, decisions))
            elif exchange.is_here("state", f, admission, LEADER):
                found.append(admission)
        own = found if len(found) == len(self._outer) else []
        answers = gather_texts(json.dumps(own))
        return own if own and set(answers) == {answers[0]} else None

    def _newest_round(self, f: int, outer: Outer, decisions: Mapping[int, Decision]) -> int:
        """Returns the round for which to ask the leader.

        It must be later than the newest round that admitted this site, or the leader takes the
        request for one that it has granted. It must not be later than the next one that will admit
        this site, or the leader grants it again after that.
        """
        newest = max(decisions, default=0)
        if newest > outer.applied:
            return newest
        # A site that has lost its folder knows of no decisions.
        return max(outer.applied + 1, self._exchange.first(f, LEADER))

    def _ask(self, f: int, round_: int) -> None:
        if (f, round_) not in self._asked:
            self._asked.add((f, round_))
            links = enumerate(self._exchange.links)
            contents = {i: b"" for i, link in links if link.site == LEADER}
            self._exchange.post("request", f, round_, contents)

    def take_states(
        self, state: Any, step: int, new_step: int, found: Sequence[int]
    ) -> tuple[Any, list[Round]]:
        """Returns the training state after `new_step`, with the leader's weights, and ledger lines.

        Args:
            state: the training state after `step`; donated.
            found: from find_states.
        """
        lines = []
        for f, round_ in enumerate(found):
            outer, programs = self._outer[f], self._places.programs[f]
            layout, size = programs.layout, 0
            # Threads of rounds that were given up may still read the old arrays.
            outer.reference, outer.momentum = outer.reference.copy(), outer.momentum.copy()
            for i, content in self._exchange.take("state", f, round_, LEADER).items():
                part = part_of_link(layout, f, self._exchange.links[i])
                vectors = np.frombuffer(content, np.float32).reshape(self._vectors, -1)
                outer.reference[part], size = vectors[0], size + len(content)
                if self._vectors > 1:
                    outer.momentum[part] = vectors[1]
            outer.error = np.zeros_like(outer.error)
            outer.round, outer.step, outer.pending = round_, new_step, None
            mode = "settle" if new_step == self._places.steps else "replace"
            state = programs.apply[mode](state, layout.to_devices(outer.reference))
            lines.append(self._describe(f, step, new_step, size))
        return _advance_counts(state, new_step - step, self._places.shardings), lines

    def _describe(self, f: int, step: int, new_step: int, size: int) -> Round:
        """Returns the ledger's line on a state that was taken over: one without codes."""
        outer = self._outer[f]
        own = [zlib.crc32(outer.reference.data), outer.reference.nbytes, size]
        parts = [json.loads(text) for text in gather_texts(json.dumps(own))]
        decision = self._exchange.decisions(f)[outer.round]
        return Round(
            fragment=f,
            round=outer.round,
            started_step=step,
            applied_step=new_step,
            tokens={},
            participants=tuple(self._places.names[k] for k in decision.participants),
            code_checksums={},
            reference_checksum=combine_crc32((crc, n) for crc, n, _ in parts),
            payload_bytes=(0, sum(n for _, _, n in parts)),
            wire_bytes=(0, 0),
            seconds=0.0,
            waited_s=0.0,
        )


def _advance_counts(state: Any, steps: int, shardings: Any) -> Any:
    """Returns the state as if so many more steps had been taken: schedules depend on these counts.

    The counts are the leaves of the optimizer's state that are named `count`. Other integers, such
    as the seed of injected noise, stay.
    """

    def advance(state):
        is_count = lambda path: getattr(path[-1], "name", None) == "count"
        later = lambda path, x: x + steps if is_count(path) else x
        opt_state = jax.tree_util.tree_map_with_path(later, state.opt_state)
        return state._replace(step=state.step + steps, opt_state=opt_state)

    return jax.jit(advance, donate_argnums=0, out_shardings=shardings)(state)
