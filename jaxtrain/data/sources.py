"""Opens what a run trains on: one corpus, or the sources of data.mixture with their plan."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtrain.config.mixture_fields import (
    Stage,
    parse_epochs,
    parse_sources,
    write_sources,
)
from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import Corpus, note_shared_shards, open_corpus
from jaxtrain.data.mixture import Mixture, StagePlan
from jaxtrain.data.shard_files import are_shards
from jaxtrain.data.tokenizer import tokenizer_identity
from jaxtrain.file_errors import add_path_to_errors


@dataclass(frozen=True)
class MixedCorpus:
    """The sources of one split, and which of them a run reads at which place of its list."""

    split: str
    sources: dict[str, Corpus]  # by name, so that another order of writing them changes nothing
    stages: tuple[Stage, ...]
    starts: tuple[int, ...]  # of the stages, in places
    places: int  # sequences that the whole run reads
    limits: dict[str, Fraction]  # most epochs of a source; no entry: no limit
    start_steps: tuple[int, ...]  # steps before each stage
    steps: int  # of the run

    @property
    def fingerprint(self) -> str:
        """Returns a hash of the sources' names and tokens."""
        parts = [f"{name} {corpus.fingerprint}\n" for name, corpus in self.sources.items()]
        return hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()[:32]

    @property
    def tokens(self) -> int:
        return sum(corpus.tokens for corpus in self.sources.values())

    @property
    def first(self) -> Corpus:
        return next(iter(self.sources.values()))

    @property
    def tokenizer_name(self) -> str | None:
        return self.first.tokenizer_name  # that of all, see open_split

    def token_bytes(self) -> np.ndarray | None:
        """Returns the bytes that each token stands for, or None if a source's are unknown."""
        sizes = [corpus.token_bytes() for corpus in self.sources.values()]
        return None if any(size is None for size in sizes) else sizes[0]

    @functools.cached_property
    def mixture(self) -> Mixture:
        return _build_mixture([*self.sources], self.stages, self.starts)

    @property
    def shares(self) -> dict[str, float]:
        """Returns each source's share of the sequences of the whole run; their sum is 1."""
        counts = self.mixture.counts(self.places) / self.places
        return dict(zip(self.sources, counts.tolist(), strict=True))

    def describe(self) -> str:
        """Returns one line about the sources for the start of a run."""
        tokenizer = self.tokenizer_name or "unknown"
        return (
            f"{self.split}: {self.tokens:,} tokens in {len(self.sources)} sources, tokenizer "
            f"{tokenizer}, fingerprint {self.fingerprint[:12]}"
        )


AnyCorpus = Corpus | MixedCorpus


class _Plan(NamedTuple):
    """What the config says of a mixture, in places."""

    stages: tuple[Stage, ...]
    starts: tuple[int, ...]
    places: int
    limits: dict[str, Fraction]
    start_steps: tuple[int, ...]
    steps: int


def open_split(
    cfg: DataConfig, split: str, vocab_size: int, workdir: str | Path, steps: int
) -> AnyCorpus:
    """Returns the corpus of a split, or the sources of data.mixture.

    Args:
        steps: of the run, which the ends of stages may be a share of.

    Raises:
        ValueError: a shard is missing or damaged, see open_corpus; a source of a mixture does not
            exist, or was encoded by another tokenizer; a stage contains no step.
    """
    if not cfg.mixture:
        with add_path_to_errors(cfg.text or cfg.shards):
            return open_corpus(cfg, split, vocab_size, workdir)
    plan = _plan_stages(cfg, steps)
    sources = {}
    paths = parse_sources(cfg.mixture)
    for name in cfg.source_names:
        path = paths[name]
        with add_path_to_errors(path):
            try:
                own = source_config(cfg, name, path)
                sources[name] = open_corpus(own, split, vocab_size, workdir)
            except ValueError as error:
                raise ValueError(f"data.mixture, source {name}: {error}") from error
    _check_tokenizers(sources)
    return MixedCorpus(split, sources, *plan)


def source_config(cfg: DataConfig, name: str, path: str) -> DataConfig:
    """Returns the config of a source: that of the mixture with data.shards or data.text as `path`.

    Raises:
        ValueError: there is nothing at the path.
    """
    is_text = not are_shards(path)
    if is_text and not os.path.exists(os.path.expanduser(path)):
        raise ValueError(
            f"each source of data.mixture must be token shards, or a file or folder of text; got "
            f"{name}={path!r}, where there is nothing. Set --data.mixture."
        )
    own = {"text": path} if is_text else {"shards": path}
    return dataclasses.replace(cfg, mixture="", stages="", max_epochs="", **own)


def open_splits(
    cfg: DataConfig, vocab_size: int, workdir: str | Path, steps: int
) -> list[AnyCorpus]:
    """Returns what to train on and what to evaluate on; notes warn of shards that are in both."""
    train, held_out = (
        open_split(cfg, split, vocab_size, workdir, steps) for split in ("train", "val")
    )
    noted = {
        name: functools.reduce(note_shared_shards, list_corpora(held_out).values(), corpus)
        for name, corpus in list_corpora(train).items()
    }
    if isinstance(train, MixedCorpus):
        return [dataclasses.replace(train, sources=noted), held_out]
    return [*noted.values(), held_out]


def point_at_shards(cfg: DataConfig, corpus: AnyCorpus) -> DataConfig:
    """Returns the config with the folders of encoded shards in place of text."""
    folder = lambda part: str(Path(part.shards[0].path).parent)
    if not isinstance(corpus, MixedCorpus):
        return cfg if cfg.shards else dataclasses.replace(cfg, text="", shards=folder(corpus))
    paths = {
        name: path if are_shards(path) else folder(corpus.sources[name])
        for name, path in parse_sources(cfg.mixture).items()
    }
    return dataclasses.replace(cfg, mixture=write_sources(paths))


def list_corpora(corpus: AnyCorpus) -> dict[str, Corpus]:
    """Returns the sources by name; a corpus that is no mixture has the name ""."""
    return corpus.sources if isinstance(corpus, MixedCorpus) else {"": corpus}


def planned_sequences(cfg: DataConfig, steps: int) -> dict[str, int]:
    """Returns how many sequences of each source of data.mixture a run reads, by the config only.

    Raises:
        ValueError: a stage contains no step.
    """
    plan, names = _plan_stages(cfg, steps), cfg.source_names
    counts = _build_mixture(names, plan.stages, plan.starts).counts(plan.places)
    return dict(zip(names, counts.tolist(), strict=True))


def _build_mixture(names: Sequence[str], stages: Sequence[Stage], starts: Sequence[int]) -> Mixture:
    plans = [
        StagePlan(start, tuple(stage.quotas.get(name, 0) for name in names))
        for start, stage in zip(starts, stages, strict=True)
    ]
    return Mixture(plans)


def _plan_stages(cfg: DataConfig, steps: int) -> _Plan:
    """Returns where each stage starts. Stages end with a step, the one nearest to the given end."""
    stages, limits = cfg.mixture_stages, parse_epochs(cfg.max_epochs, cfg.source_names)
    starts = [0]
    for i, stage in enumerate(stages[:-1], start=1):
        starts.append(cfg.stage_end(stage, steps))
        if starts[-1] <= starts[-2]:
            raise ValueError(
                f"data.stages must have stages of at least one step; got stage {i}, which ends "
                f"after step {starts[-1]} and starts after step {starts[-2]} of {steps}. Set "
                "--data.stages or --steps."
            )
    places = tuple(cfg.sizes.sequences_before(step) for step in starts)
    return _Plan(stages, places, cfg.sizes.sequences_before(steps), limits, tuple(starts), steps)


def _check_tokenizers(sources: dict[str, Corpus]) -> None:
    """Raises ValueError if not all sources were encoded by the same tokenizer."""
    names = {name: corpus.tokenizer_name for name, corpus in sources.items()}
    if len({name and tokenizer_identity(name) for name in names.values()}) == 1:
        return
    found = ", ".join(f"{name}: {tokenizer or 'unknown'}" for name, tokenizer in names.items())
    raise ValueError(
        f"all sources of data.mixture must have one tokenizer; got {found}. Encode them again with "
        "the same --tokenizer, or set --data.tokenizer if the shards do not name theirs."
    )
