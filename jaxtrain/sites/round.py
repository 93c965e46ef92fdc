"""Exchanges one fragment with the other sites once: what the threads of a round do.

A thread copies the weights of the round's step to the host, encodes their change since the round
before, sends the code, waits for those of the other sites and computes the new reference.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxtrain.config.run_sections import SitesConfig
from jaxtrain.distributed.broadcast import gather_texts
from jaxtrain.sites import BLOCK
from jaxtrain.sites.checksum import combine_crc32
from jaxtrain.sites.codec import CODECS, Codec, NonFiniteDelta
from jaxtrain.sites.decisions import Decision
from jaxtrain.sites.errors import Disagreement
from jaxtrain.sites.fragments import DeviceLayout, Programs
from jaxtrain.sites.layout import Link
from jaxtrain.sites.ledger import Round
from jaxtrain.sites.outer import difference_from_mean, encode_with_feedback, outer_step

POLL_S = 1.0  # between two looks at signals while waiting


class Codes(Protocol):
    """The methods of jaxtrain.sites.exchange.Exchange that rounds need."""

    links: list[Any]

    def send(self, fragment, round_, codes, tokens, checksum) -> None: ...
    def wait(self, fragment, round_, timeout_s) -> Any: ...
    def missing(self, fragment, round_) -> tuple[int, ...]: ...
    def decisions(self, fragment) -> dict[int, Decision]: ...
    def first(self, fragment, site) -> int: ...
    def post(self, kind, fragment, round_, contents) -> None: ...
    def is_here(self, kind, fragment, round_, site) -> bool: ...
    def take(self, kind, fragment, round_, site) -> dict[int, bytes]: ...
    def away(self) -> set[int]: ...
    def flush(self) -> None: ...
    def finish(self, timeout_s, without) -> bool: ...
    def durable(self, oldest: dict[int, int]) -> None: ...


class Outcome(NamedTuple):
    """A complete round: the new outer state, and what the ledger records of it."""

    reference: np.ndarray
    momentum: np.ndarray
    error: np.ndarray
    codes: dict[str, np.ndarray]  # of each site that took part, of the blocks of this process
    tokens: dict[str, int]  # of each site that took part
    arrived: Any  # Arrived of the exchange
    kept: np.ndarray | None = None  # with sites.blend: what to keep of the difference from the mean


class Pending(NamedTuple):
    """A round that has started and is not applied."""

    weights: Future  # float32 [owned], on the host
    outcome: Future


@dataclasses.dataclass
class Outer:
    """The outer state of one fragment: the blocks that this process owns, float32.

    Attributes:
        reference: weights that all sites continued from after the newest applied round.
        momentum: of the outer optimizer; empty without.
        error: what codes have lost so far; empty for a lossless code.
        round: number of the newest round that was started, from 1.
        step: after which it was started.
        tokens: that this site trained on before it, since the start of the round before.
    """

    reference: np.ndarray
    momentum: np.ndarray
    error: np.ndarray
    round: int = 0
    step: int = 0
    tokens: int = 0
    pending: Pending | None = None

    @property
    def applied(self) -> int:
        """The newest round that was applied."""
        return self.round - (self.pending is not None)


class Places(NamedTuple):
    """What rounds must know of the run: its programs, its shardings, and its place among the sites.

    Attributes:
        programs: of each fragment.
        shardings: of the whole training state.
        names: of all sites, in their order.
        site: index of this one.
        steps, step_tokens: of the run.
    """

    programs: list[Programs]
    shardings: Any
    names: list[str]
    site: int
    steps: int
    step_tokens: int


def run_round(
    cfg: SitesConfig,
    places: Places,
    layout: DeviceLayout,
    exchange: Codes,
    is_open: Callable[[], bool],
    f: int,
    outer: Outer,
    weights: np.ndarray,
) -> Outcome | None:
    """Sends a round's code, waits for the others and computes the outer step.

    Args:
        is_open: whether to keep waiting.
        f: the fragment.
        outer: its state before the round.
        weights: float32 [owned], those after the round's step.

    Returns:
        the round; None if is_open became false.

    Raises:
        NonFiniteDelta: a weight is not finite; nothing was sent.
        SiteError: another site disagrees, or the exchange has failed.
    """
    codec, name = CODECS[cfg.codec], places.names[places.site]
    try:
        x = weights if codec.lossless else outer.reference - weights + outer.error
        code, error = encode_with_feedback(codec, x, cfg.error_decay)
    except NonFiniteDelta as fault:
        raise NonFiniteDelta(
            f"the weights of site {name} must be finite to be sent to the other sites; those of "
            f"fragment {f} after step {outer.step} are not: {fault} Nothing was sent. Resume from "
            "an earlier checkpoint, or lower --optim.learning_rate."
        ) from fault
    size, cut = codec.code_bytes(BLOCK), functools.partial(part_of_link, layout, f)
    links = dict(enumerate(exchange.links))
    exchange.send(
        f,
        outer.round,
        {i: code[cut(link, size)].tobytes() for i, link in links.items()},
        outer.tokens,
        {i: zlib.crc32(outer.reference[cut(link, BLOCK)].data) for i, link in links.items()},
    )
    while not (arrived := exchange.wait(f, outer.round, POLL_S)):
        if not is_open():
            return None
    codes, tokens = {places.site: code}, {**arrived.tokens, places.site: outer.tokens}
    for site, parts in arrived.codes.items():
        codes[site] = np.empty_like(code)
        for i, part in parts.items():
            codes[site][cut(links[i], size)] = np.frombuffer(part, np.uint8)
    order = sorted(arrived.participants)
    args = outer.reference, outer.momentum, cfg.rate, cfg.momentum
    in_order = [codes[k] for k in order], [tokens[k] for k in order]
    reference, momentum = outer_step(codec, *in_order, *args)
    others = {places.names[k]: codes[k] for k in order if k != places.site}
    _check_finite(codec, others, reference, f"round {outer.round} of fragment {f}")
    for vector in filter(len, (reference, momentum, error)):
        layout.clear_padding(vector)
    kept = None
    if cfg.blend:
        own = order.index(places.site)
        kept = difference_from_mean(codec, *in_order, own, reference.size)
        kept *= np.float32(cfg.blend)
    by_name = lambda values: {places.names[k]: values[k] for k in order}
    return Outcome(reference, momentum, error, by_name(codes), by_name(tokens), arrived, kept)


def _check_finite(
    codec: Codec, codes: Mapping[str, np.ndarray], reference: np.ndarray, which: str
) -> None:
    """Raises Disagreement if a site's code contains NaN or an infinity.

    Args:
        codes: {site: code} of the other sites. A site checks its own one when it encodes it.
        reference: the new one, which is then not finite either; codes are decoded only if so.
        which: names the round.
    """
    if np.isfinite(np.sum(reference, dtype=np.float64)):
        return
    for name, code in codes.items():
        if not np.isfinite(codec.decode(code, reference.size)).all():
            raise Disagreement(
                f"the codes of {which} must be finite; that of site {name} is not, and was not "
                "used. The memory of one of its hosts may be damaged. Restart all sites from one "
                "checkpoint."
            )


def part_of_link(layout: DeviceLayout, f: int, link: Link, unit: int = BLOCK) -> slice:
    """Returns where a link's blocks are in a vector of this process.

    Args:
        unit: elements of a block in the vector.
    """
    blocks, first = link.ranges[f], layout.owned.start
    return slice((blocks.start - first) * unit, (blocks.stop - first) * unit)


def summarize_round(
    places: Places,
    layout: DeviceLayout,
    f: int,
    outer: Outer,
    outcome: Outcome,
    step: int,
    waited_s: float,
) -> Round:
    """Returns the ledger's line on a round that is applied after `step`.

    The checksums are those of the whole fragment, equal at all sites whatever their numbers of
    processes. All processes must call it.
    """
    arrived = outcome.arrived
    parts = [json.loads(text) for text in gather_texts(describe_part(outcome))]
    sums = lambda name: (sum(part[name][0] for part in parts), sum(part[name][1] for part in parts))
    return Round(
        fragment=f,
        round=outer.round,
        started_step=outer.step,
        applied_step=step,
        tokens=outcome.tokens,
        participants=tuple(places.names[k] for k in arrived.participants),
        code_checksums={
            name: combine_crc32((part["codes"][i], part["code_bytes"]) for part in parts)
            for i, name in enumerate(outcome.codes)
        },
        reference_checksum=combine_crc32(part["reference"] for part in parts),
        payload_bytes=sums("payload"),
        wire_bytes=sums("wire"),
        seconds=max(part["seconds"] for part in parts),
        waited_s=waited_s,
    )


def describe_part(outcome: Outcome) -> str:
    """Returns what this process contributes to a ledger's line, without the sites' long names.

    All codes have equal sizes. The text must fit into broadcast.MESSAGE_BYTES.
    """
    arrived, codes = outcome.arrived, list(outcome.codes.values())
    part = {
        "codes": [zlib.crc32(code.data) for code in codes],
        "code_bytes": codes[0].size,
        "reference": (zlib.crc32(outcome.reference.data), outcome.reference.nbytes),
        "payload": arrived.payload_bytes,
        "wire": arrived.wire_bytes,
        "seconds": arrived.seconds,
    }
    return json.dumps(part)
