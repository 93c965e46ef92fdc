"""The section of a TrainConfig on data: text or token shards, of one source or of several."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from jaxtrain.config.batch_schedule import BatchSchedule, parse_schedule
from jaxtrain.config.fields import Section, knob
from jaxtrain.config.mixture_fields import Stage, parse_epochs, parse_sources, parse_stages


@dataclass(frozen=True)
class DataConfig(Section):
    PREFIX = "data."

    text: str = knob("", "file or folder of text; empty uses Python's standard library")
    text_field: str = knob("text", "key or column of the text if data.text is JSON or a table")
    shards: str = knob("", "folder, file or glob of token shards; empty encodes data.text")
    mixture: str = knob(
        "",
        "several sources instead of data.text or data.shards: 'web=PATH code=PATH', each a path of "
        "text or of token shards",
    )
    stages: str = knob(
        "",
        "weights of the sources of data.mixture, by stage: 'web 0.9, code 0.1 until 80%; web 0.5, "
        "code 0.5'; a stage ends at a share of the run's steps, or at a number of tokens as in "
        "'until 2e9'",
    )
    max_epochs: str = knob(
        "",
        "most times that the run may read a source of data.mixture: '4', or 'web 1, code 4'; empty "
        "sets no limit",
    )
    shard_format: str = knob(
        "auto",
        "file format of the shards; auto detects it",
        choices=("auto", "llmc", "nanogpt", "megatron"),
    )
    tokenizer: str = knob("bytes", "'bytes', 'gpt2' or the path of a tokenizer.json")
    val_fraction: float = knob(0.05, "held-out fraction of data.text", low=0.0, high=0.5)
    batch: int = knob(8, "sequences per step, on all devices together", unit="sequences", low=1)
    batch_schedule: str = knob(
        "",
        "sequences per step by the tokens so far: '0:128 2e8:256' begins with 128 and has 256 from "
        "the first step at or after 2e8 tokens; data.batch / accumulation is then the microbatch, "
        "and optim.batch_scaling scales the rates; empty keeps data.batch",
    )
    seq_len: int = knob(256, "length of each sequence", unit="tokens", low=1)
    pack: bool = knob(False, "fit whole documents into sequences instead of cutting them")
    document_mask: bool = knob(False, "mask attention between different documents of a sequence")
    eot: int = knob(
        -1,
        "id of the token that separates documents in the shards; -1 takes it from their meta.json",
        low=-1,
    )
    prefetch: int = knob(2, "batches to read ahead of the step; 0 reads in the loop", low=0)

    def __post_init__(self):
        super().__post_init__()
        self._read("batch_schedule", lambda: self.sizes)
        if not self.mixture:
            for name in ("stages", "max_epochs"):
                if getattr(self, name):
                    self.fail(name, "must be empty without data.mixture")
            return
        for name in ("text", "shards"):
            if getattr(self, name):
                self.fail(name, "must be empty with data.mixture, which names all sources")
        sources = self._read("mixture", lambda: parse_sources(self.mixture))
        self._read("stages", lambda: parse_stages(self.stages, sources))
        self._read("max_epochs", lambda: parse_epochs(self.max_epochs, sources))

    @property
    def sizes(self) -> BatchSchedule:
        """The number of sequences of each step."""
        return parse_schedule(self.batch_schedule, self.batch, self.seq_len)

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources of data.mixture in the order of their numbers; () without a mixture."""
        return tuple(sorted(parse_sources(self.mixture)))

    @property
    def mixture_stages(self) -> tuple[Stage, ...]:
        """The stages of data.mixture; () without a mixture."""
        sources = parse_sources(self.mixture)
        return parse_stages(self.stages, sources) if sources else ()

    def stage_end(self, stage: Stage, steps: int) -> int:
        """Returns the step nearest to the end of a stage, of a run of `steps`; not of the last."""
        if stage.share is not None:
            return round(stage.share * steps)
        return self.sizes.step_at(Fraction(stage.tokens or 0, self.seq_len))

    def tokens_before(self, step: int) -> int:
        """Returns the tokens of all steps before this one, counted from 0."""
        return self.sizes.sequences_before(step) * self.seq_len

    def tokens_of(self, step: int) -> int:
        """Returns the tokens of a step, counted from 1."""
        return self.sizes.sequences(step - 1) * self.seq_len

    def _read(self, name: str, parse: Callable[[], Any]) -> Any:
        """Returns what a field's text stands for; raises ValueError with its flag and value."""
        try:
            return parse()
        except ValueError as error:
            self.fail(name, str(error))
