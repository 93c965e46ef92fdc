"""The sections of a TrainConfig that say where a run computes, and what it stores and reports."""

from dataclasses import dataclass

from jaxtrain.config.fields import Section, knob
from jaxtrain.config.task_list import parse_tasks


@dataclass(frozen=True)
class MeshConfig(Section):
    PREFIX = "mesh."

    replica: int = knob(1, "number of copies of the parameters; -1 uses all devices left", low=-1)
    fsdp: int = knob(-1, "devices that a copy is split over; -1 uses all devices left", low=-1)
    tensor: int = knob(1, "devices that split each layer; -1 uses all devices left", low=-1)


@dataclass(frozen=True)
class CheckpointConfig(Section):
    PREFIX = "checkpoint."

    storage: str = knob(
        "shared",
        "where workdir is: on a disk that all hosts share, or on process 0's own disk (host0)",
        choices=("shared", "host0"),
    )


@dataclass(frozen=True)
class SampleConfig(Section):
    PREFIX = "sample."

    prompt: str = knob("", "text to continue at the end of a run; empty uses held-out text")
    tokens: int = knob(256, "tokens to sample at the end; 0 samples none", unit="tokens", low=0)
    temperature: float = knob(
        0.7, "sampling temperature; 0 always takes the likeliest token", low=0.0
    )
    top_k: int = knob(50, "draw from this many of the likeliest tokens; 0 draws from all", low=0)


@dataclass(frozen=True)
class EvalConfig(Section):
    """What each evaluation scores besides the held-out text of the run's data."""

    PREFIX = "eval."

    tasks: str = knob(
        "",
        "tasks and further held-out texts to evaluate on, as NAME=PATH or NAME=KIND:PATH, "
        "separated by spaces; kinds are hellaswag, arc, choices, last_word, llmc and heldout",
    )
    examples: int = knob(
        0, "examples of a task that an evaluation scores, spread evenly; 0 scores all", low=0
    )
    start_token: bool = knob(
        True, "begin each example of a task with the token that starts documents, as in training"
    )

    def __post_init__(self):
        super().__post_init__()
        try:
            parse_tasks(self.tasks)
        except ValueError as error:
            self.fail("tasks", str(error))


@dataclass(frozen=True)
class MeasureConfig(Section):
    """Additional measurements, which do not change the trained weights."""

    PREFIX = "measure."

    phases: bool = knob(False, "time each phase of a step separately, once")
    details: bool = knob(
        False, "at the start, print the routes, optimizer groups and metrics of config.json"
    )
    straggler_every: int = knob(
        50,
        "steps from one timing of a small fixed computation on every process to the next, which "
        "finds slow hosts; only with several processes; 0 times none",
        unit="steps",
        low=0,
    )
    straggler_cost: float = knob(
        0.005,
        "largest share of the steps' time for these timings; above it, they become rarer",
        low=1e-6,
    )


@dataclass(frozen=True)
class ProfileConfig(Section):
    PREFIX = "profile."

    steps: int = knob(0, "steps to trace after warm-up, into workdir/profile; 0 traces none", low=0)


@dataclass(frozen=True)
class ExportConfig(Section):
    PREFIX = "export."

    port: int = knob(0, "port that serves metrics to Prometheus; 0 serves none", low=0, high=65_535)
    address: str = knob(
        "127.0.0.1", "address that export.port listens on; 0.0.0.0 is every network"
    )
    tracker: str = knob(
        "",
        "experiment tracker that also receives the config, metrics and summary: wandb, mlflow, or "
        "a class of your own, as MODULE:CLASS or FILE.py:CLASS; empty sends nothing",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.tracker not in ("", "wandb", "mlflow") and ":" not in self.tracker.strip(":"):
            self.fail("tracker", "must be empty, wandb, mlflow, MODULE:CLASS or FILE.py:CLASS")


@dataclass(frozen=True)
class NotifyConfig(Section):
    PREFIX = "notify."

    url: str = knob(
        "env:JAXTRAIN_NOTIFY_URL",
        "variable (env:NAME) or file (file:PATH) that contains the address of a webhook: Slack, "
        "Discord, ntfy or JSON. It receives an alert when the run diverges, fails, stops or is "
        "done, and when a process becomes slow; empty sends none",
    )


@dataclass(frozen=True)
class SitesConfig(Section):
    """Training on several sites that exchange their changes of the weights now and then."""

    PREFIX = "sites."

    period: int = knob(
        0,
        "steps from one exchange with the other sites to the next; needs --sites_file and --site; "
        "0 trains on this site only",
        unit="steps",
        low=0,
    )
    codec: str = knob(
        "float32",
        "code of what is exchanged: 32, 16, 8.1, 4.3 or 2.1 bits a parameter",
        choices=("float32", "bf16", "int8", "int4", "int2"),
    )
    fragments: int = knob(
        1, "parts of the model that are exchanged at different times of a period", low=1
    )
    delay: int = knob(
        0,
        "steps to train on between starting an exchange and applying its result; 0 waits for it",
        unit="steps",
        low=0,
    )
    blend: float = knob(
        0.0,
        "with a delay: share that a site keeps of the difference between its weights and the "
        "sites' mean at an exchange's start",
        low=0.0,
        high=1.0,
    )
    rate: float = knob(
        0.7, "factor of the sites' mean change; 1, without momentum, averages weights", low=0.0
    )
    momentum: float = knob(0.6, "Nesterov momentum of these changes", low=0.0, high=0.9999)
    error_decay: float = knob(
        0.95,
        "share of what a code has lost that is added to the next exchange; unused with float32",
        low=0.0,
        high=1.0,
    )
    grace: int = knob(
        2,
        "periods to train on if a delayed exchange is late, before waiting for it",
        unit="periods",
        low=0,
    )
    on_loss: str = knob(
        "wait",
        "if a site is lost: wait for it, or go on with fewer, as the first site decides",
        choices=("wait", "fewer"),
    )
    lost_s: float = knob(
        600.0,
        "time without a byte from a site, after which it counts as lost with on_loss=fewer; longer "
        "than its restart takes",
        unit="s",
        low=1.0,
    )
