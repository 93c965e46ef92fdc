"""Sites that train in threads of one process, and exchange through memory."""

import dataclasses
import functools
import threading
import zlib
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import numpy as np

import runs
from jaxtrain.config.run_sections import SitesConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.interop.initial_state import initial_state
from jaxtrain.model.trees import named_leaves
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.sites.fragments import build_programs, split_leaves
from jaxtrain.sites.layout import Link
from jaxtrain.sites.outer_state import add_outer_state, restore_outer_state
from jaxtrain.sites.rounds import Places, Rounds
from jaxtrain.training.run import build_run, compile_step
from jaxtrain.training.step import TrainState, state_sharding_tree

RUNS = {}


class Hub:
    """The messages of all sites, by (sender, kind, fragment, round).

    Attributes:
        withheld: senders whose messages nobody receives for now.
        backwards: whether codes are handed over in the reverse order of the sites.
    """

    def __init__(self, sites):
        self.sites, self.messages, self.changed = sites, {}, threading.Condition()
        self.withheld, self.backwards, self.failed = set(), False, False

    def put(self, sender, kind, fragment, round_, message):
        with self.changed:
            key = (sender, kind, fragment, round_)
            assert self.messages.setdefault(key, message) == message, f"{key} was sent before"
            self.changed.notify_all()

    def get(self, sender, kind, fragment, round_):
        hidden = sender in self.withheld
        return None if hidden else self.messages.get((sender, kind, fragment, round_))


class MemoryExchange:
    """Has the methods of jaxtrain.sites.exchange.Exchange, for one process of a site."""

    def __init__(self, hub, site, blocks):
        self.hub, self.site = hub, site
        self.others = [k for k in range(hub.sites) if k != site]
        self.links = [Link(k, 0, tuple(map(range, blocks))) for k in self.others]

    def send(self, fragment, round_, codes, tokens, checksum):
        assert len(set(codes.values())) <= 1  # every other site gets the whole code
        code = next(iter(codes.values()), b"")
        reference = next(iter(checksum.values()), 0)
        self.hub.put(self.site, "code", fragment, round_, (code, tokens, reference))

    def wait(self, fragment, round_, timeout_s):
        with self.hub.changed:
            complete = lambda: self.hub.failed or not self.missing(fragment, round_)
            if not self.hub.changed.wait_for(complete, timeout_s):
                return None
        assert not self.hub.failed, "another site has failed"
        found = {k: self.hub.get(k, "code", fragment, round_) for k in self.others}
        order = sorted(found, reverse=self.hub.backwards)
        own = self.hub.messages[self.site, "code", fragment, round_]
        assert {found[k][2] for k in order} <= {own[2]}, "the references differ"
        link_of = {link.site: i for i, link in enumerate(self.links)}
        return SimpleNamespace(
            codes={k: {link_of[k]: found[k][0]} for k in order},
            tokens={k: found[k][1] for k in order},
            participants=tuple(range(self.hub.sites)),
            admitted=(),
            payload_bytes=(len(own[0]), sum(len(found[k][0]) for k in order)),
            wire_bytes=(0, 0),
            seconds=0.0,
        )

    def missing(self, fragment, round_):
        return tuple(k for k in self.others if not self.hub.get(k, "code", fragment, round_))

    def post(self, kind, fragment, round_, contents):
        for i, content in contents.items():
            self.hub.put(self.site, (kind, self.links[i].site), fragment, round_, content)

    def is_here(self, kind, fragment, round_, site):
        return self.hub.get(site, (kind, self.site), fragment, round_) is not None

    def take(self, kind, fragment, round_, site):
        content = self.hub.get(site, (kind, self.site), fragment, round_)
        return {i: content for i, link in enumerate(self.links) if link.site == site}

    def away(self):
        return set()

    def finish(self, timeout_s, without):
        return True

    def flush(self):
        pass

    def durable(self, oldest):
        self.oldest = oldest


@functools.cache
def build(text, optimizer=None, **values):
    """Returns (run, compiled step, corpus); an optax transformation replaces the config's."""
    cfg = runs.debug_config(
        text.parent / "run", text, model__L=1, model__D=16, model__F=32, data__seq_len=16, **values
    )
    run = build_run(cfg, jax.devices()[:1])
    run = run._replace(optimizer=optimizer) if optimizer else run
    state = jax.device_get(initial_state(run)[0])
    return run, compile_step(run), open_corpus(cfg.data, "train", cfg.model.V, text.parent), state


@functools.cache
def programs_of(run_id, fragments):
    """Returns the compiled functions of a run's fragments, which its sites share."""
    run = RUNS[run_id]
    shapes = {path: x.shape for path, x in named_leaves(run.model.shapes).items()}
    shardings = state_sharding_tree(run.model, run.optimizer, run.mesh)
    split = split_leaves(shapes, fragments)
    return [build_programs(fragment, run.mesh, shardings) for fragment in split], shardings


class Site:
    """One site: its state, its batches and its rounds."""

    def __init__(
        self, built, hub, site, steps, saved=None, workdir=None, open_exchange=None, **sites
    ):
        self.run, self.step, corpus, start = built
        cfg, run = self.run.cfg, self.run
        section = SitesConfig(**{"rate": 1.0, "momentum": 0.0} | sites)
        RUNS[id(run)] = run
        programs, shardings = programs_of(id(run), section.fragments)
        names = [f"site{k}" for k in range(hub.sites)]
        tokens = cfg.data.batch * cfg.data.seq_len
        places = Places(programs, shardings, names, site, steps, tokens)
        blocks = [program.layout.fragment.blocks for program in programs]
        exchange = open_exchange(blocks) if open_exchange else MemoryExchange(hub, site, blocks)
        self.notes = []
        self.rounds, self.hub, self.steps = Rounds(section, places, exchange), hub, steps
        self.batches = build_batches(cfg.data, corpus, run.mesh, cfg.seed, (site, hub.sites))
        self.first, self.saves, self.metrics, self.taken = 0, {}, [], []
        with jax.set_mesh(run.mesh):
            if saved:
                tree, meta, self.first = saved
                tree = jax.device_put(tree, {**shardings._asdict(), "sites": None})
                self.state = restore_outer_state(self.rounds, tree, meta, TrainState)
                self.batches.restore(self.batches.state() | {"step": self.first})
            else:
                self.state = jax.device_put(start, shardings)
                self.rounds.begin(self.state)
        if workdir:
            self.rounds.log.open(workdir, self.rounds.applied_rounds(), self.notes.append)

    def train(self, until=None, before=lambda site, step: None, stop=lambda: None, save=()):
        """Trains up to a step; `before` is called before the rounds of each step."""
        rates, step, until = self.run.rates(), self.first, until or self.steps
        with self.rounds, self.batches, jax.set_mesh(self.run.mesh):
            if self.first:
                step = self._exchange(step, stop)
            while step < until:
                step += 1
                self.state, _ = self.step(self.state, next(self.batches), rates)
                before(self, step)
                step = self._exchange(step, stop)
                if step in save:
                    tree, meta = add_outer_state(self.rounds, self.state, step, [*self.saves], 1)
                    self.saves[step] = jax.device_get(tree), meta, step
        return self

    def _exchange(self, step, stop):
        """Does what jaxtrain.training.loop does after a step."""
        self.state, new_step = self.rounds.after_step(self.state, step, stop, nullcontext)
        self.metrics += self.rounds.log.take_metrics()
        self.taken += [new_step] if self.rounds.took_over else []
        if new_step != step:
            self.batches.restore(self.batches.state() | {"step": new_step})
        return new_step

    def weights(self):
        """Returns the evaluated weights, as one vector."""
        leaves = jax.tree.leaves(eval_params(self.state.opt_state, self.state.params))
        return np.concatenate([np.ravel(x) for x in leaves])

    def crc(self):
        """Returns a checksum of the whole training state."""
        return zlib.crc32(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(self.state)))


def arrive_in_time(site, step):
    """Waits for each round before it is due: steps take no time here."""
    for outer in site.rounds.outer:
        if outer.pending and step == outer.step + site.rounds.cfg.delay:
            outer.pending.outcome.exception(60)


def train_together(sites, **given):
    """Trains several Sites in threads; raises the first error of one of them."""
    errors = []

    def train(site):
        try:
            site.train(**given)
        except BaseException as error:
            errors.append(error)
            site.hub.failed = True

    threads = [threading.Thread(target=train, args=(site,)) for site in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sites


def replace_batch(built, batch):
    """Returns what build() returned, with another batch size."""
    run, _, corpus, state = built
    data = dataclasses.replace(run.cfg.data, batch=batch)
    run = run._replace(cfg=dataclasses.replace(run.cfg, data=data))
    return run, compile_step(run), corpus, state
