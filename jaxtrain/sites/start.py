"""Opens the exchange with the other sites of a job, from the sites file and the config."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.distributed.heartbeat import beat
from jaxtrain.distributed.key_value import open_store
from jaxtrain.distributed.preemption import end_at_signals
from jaxtrain.model.trees import named_leaves
from jaxtrain.sites import BLOCK
from jaxtrain.sites.decisions import LEADER
from jaxtrain.sites.ends import compare_ends
from jaxtrain.sites.exchange import Exchange
from jaxtrain.sites.fragments import build_programs, split_leaves
from jaxtrain.sites.identity import shared_fields
from jaxtrain.sites.layout import SitesFile, read_sites_file
from jaxtrain.sites.rounds import REMIND_S, Places, Rounds

FORMAT = 1  # of codes and messages
FINISH_S = 600.0  # at the end of a run, to send what other sites have not stored yet


class Membership(NamedTuple):
    """This run's place among the sites of its job."""

    file: SitesFile
    name: str

    @property
    def site(self) -> int:
        """The index of this site."""
        return self.file.index(self.name)

    def describe(self) -> dict[str, Any]:
        """Returns this site's name and those of all, for config.json."""
        return {"name": self.name, "sites": self.file.names}


def check_sites_flags(period: int, sites_file: str, site: str) -> None:
    """Raises ValueError if only some of what several sites need is set."""
    if any((period, sites_file, site)) and not all((period, sites_file, site)):
        raise ValueError(
            "several sites need --sites.period, --sites_file and --site; got "
            f"sites.period={period}, sites_file={sites_file!r}, site={site!r}. Set all or none of "
            "them."
        )


def read_membership(cfg: TrainConfig, sites_file: str, site: str) -> Membership | None:
    """Returns the run's place among sites; None if it trains on one site only.

    Raises:
        ValueError: only some of sites.period, --sites_file and --site are set, the file is invalid,
            or it lists another number of processes.
    """
    check_sites_flags(cfg.sites.period, sites_file, site)
    if not site:
        return None
    member = Membership(read_sites_file(sites_file), site)
    listed = len(member.file.sites[member.site].processes)
    if listed != jax.process_count():
        raise ValueError(
            f"--sites_file must list all processes of site {site}; got {listed} in {sites_file}, "
            f"and {jax.process_count()} in this run."
        )
    return member


@contextlib.contextmanager
def open_rounds(
    cfg: TrainConfig,
    member: Membership,
    shapes: Any,
    shardings: Any,
    mesh: jax.sharding.Mesh,
    identity: dict[str, str],
) -> Iterator[Rounds]:
    """Connects to the other sites for as long as the context lasts.

    Args:
        shapes: of the parameters.
        shardings: of the whole training state.
        identity: what else must be equal at all sites: hashes of the data and of the code.

    Raises:
        ValueError: the port is in use, or the stored codes belong to another job.
    """
    leaves = {path: leaf.shape for path, leaf in named_leaves(shapes).items()}
    fragments = split_leaves(leaves, cfg.sites.fragments)
    step_tokens = cfg.data.batch * cfg.data.seq_len
    programs = [build_programs(fragment, mesh, shardings) for fragment in fragments]
    names = member.file.names
    places = Places(programs, shardings, names, member.site, cfg.steps, step_tokens)
    identity = shared_fields(cfg) | identity | {"the format": str(FORMAT)}
    blocks = [fragment.blocks for fragment in fragments]
    folder = Path(cfg.workdir) / "sites"
    place = member.file, member.name, jax.process_index()
    lost_s = cfg.sites.lost_s if cfg.sites.on_loss == "fewer" else 0.0
    store = open_store()
    with (
        Exchange(
            *place, blocks, identity, folder, logging.info, lost_s=lost_s, store=store
        ) as exchange,
        Rounds(cfg.sites, places, exchange) as rounds,
    ):
        yield rounds
        finish(rounds)


def describe_rounds(rounds: Rounds) -> Iterator[str]:
    """Yields sentences on the sites, what they exchange and when."""
    cfg, names = rounds.cfg, rounds.places.names
    yield f"{names[rounds.places.site]}, of {', '.join(names)}"
    fragments = [layout.fragment for layout in rounds.layouts]
    elements = [fragment.elements for fragment in fragments]
    size = sum(rounds.codec.code_bytes(x.blocks * BLOCK) for x in fragments)
    parts = f" in {len(elements)} fragments" if len(elements) > 1 else ""
    use = f"used {cfg.delay} steps later" if cfg.delay else "waited for"
    yield (
        f"every {cfg.period} steps {sum(elements):,} parameters{parts}, {cfg.codec}: "
        f"{size:,} bytes to each other site, {use}"
    )
    if cfg.on_loss == "fewer":
        yield f"{names[LEADER]} leaves out sites that it has not heard for {cfg.lost_s:g} s"
    if rounds.log.replay:
        yield f"{len(rounds.log.replay)} recorded rounds are replayed at their recorded steps"


def finish(rounds: Rounds, timeout_s: float = FINISH_S, remind_s: float = REMIND_S) -> None:
    """Compares the final weights with those of the other sites, if the run has reached its end.

    Waits until the others have the last messages of this process: nobody could send them later.
    With sites.on_loss=wait it waits without a limit for the others' final checksums: a site that
    has not sent them may still need the last codes of this one. A site that has sent them needs
    only the checksum of this one, so that wait is limited. All is saved, so a signal ends the wait.

    Raises:
        Disagreement: another site has other final weights.
    """
    exchange, places = rounds.exchange, rounds.places
    if rounds.finished_step != places.steps:  # an earlier end, of a run that was extended since
        return
    away = exchange.away()
    for site in sorted(away):
        logging.warning(
            "site %s was away at the end of the run: its weights are older than those of site %s",
            *(places.names[site], places.names[places.site]),
        )
    args = exchange, rounds.layouts, rounds.outer, places.names
    limit_s = math.inf if rounds.cfg.on_loss == "wait" else timeout_s
    started_s, waited_s = time.monotonic(), 0.0
    while late := compare_ends(*args, min(remind_s, limit_s - waited_s)):
        end_at_signals()
        names, waited_s = ", ".join(late), time.monotonic() - started_s
        rounds.log.show(f"waits for the end of {names}")  # in the next beat
        beat("sites")
        if waited_s >= limit_s:
            logging.warning(
                "the final weights could not be compared with those of %s: nothing came in %g s",
                *(names, timeout_s),
            )
            break
        logging.warning(
            "waiting for %.0f s at the end of the run: the final checksum of %s has not arrived, "
            "so it may still need the last codes of this site. If its job has ended, resume it; or "
            "stop this site, which has saved everything",
            *(waited_s, names),
        )
    if not exchange.finish(0.0 if late else timeout_s, without=away):
        logging.warning(
            "the other sites have not stored the last messages in %g s: resume this site if one of "
            "them still waits for it",
            timeout_s,
        )
