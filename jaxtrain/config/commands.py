"""The table of all commands: the name after `jaxtrain`, the function that it calls, and its form.

Every command can be started in two ways that do the same: `jaxtrain train` and
`python -m jaxtrain.train`. Help and messages show the one that the user took.
"""

import re
from typing import NamedTuple


class Command(NamedTuple):
    name: str
    module: str  # what follows `python -m`
    function: str  # of (argv, prog)
    group: str
    text: str
    words: tuple[str, ...] = ()  # that come first after the module

    @property
    def long_form(self) -> str:
        return " ".join(["python -m", self.module, *self.words])


COMMANDS = (
    Command("train", "jaxtrain.train", "command", "train", "train the model that a config names"),
    Command("encode", "jaxtrain.data.encode", "main", "train", "turn text into token shards"),
    Command("evaluate", "jaxtrain.evaluate", "command", "train", "held-out loss of a run"),
    Command("generate", "jaxtrain.generate", "command", "train", "sample text from a run"),
    Command(
        "export",
        "jaxtrain.interop",
        "command",
        "train",
        "write a run's weights for Hugging Face or llm.c",
        ("export",),
    ),
    Command(
        "import",
        "jaxtrain.interop",
        "command",
        "train",
        "make a run of Hugging Face or llm.c weights",
        ("import",),
    ),
    Command("summary", "launch.summary", "main", "look", "what a run did: a table and a page"),
    Command("compare", "launch.compare", "main", "look", "one run on two kinds of device"),
    Command("profile", "jaxtrain.profile", "main", "look", "where a traced step's time went"),
    Command("plan", "jaxtrain.plan", "command", "plan", "memory and time on a GPU not at hand"),
    Command("bench", "jaxtrain.bench", "main", "plan", "time training against PyTorch and peaks"),
    Command("study", "jaxtrain.study", "command", "plan", "compare optimizers on equal terms"),
    Command("launch", "launch.run", "main", "hosts", "train on several hosts over SSH"),
    Command("slo", "launch.slo", "main", "hosts", "hold runs to a baseline; price tokens"),
    Command("doctor", "jaxtrain.doctor", "main", "check", "can this machine train? what fixes it?"),
    Command(
        "crosscheck", "jaxtrain.crosscheck", "command", "check", "compare with PyTorch step by step"
    ),
)
GROUPS = {
    "train": "Train and data",
    "look": "Look at runs",
    "plan": "Plan and measure",
    "hosts": "Several hosts",
    "check": "Check",
}
BY_NAME = {command.name: command for command in COMMANDS}
_MENTION = re.compile(
    rf"(?:python -m )?\bjaxtrain (?P<name>{'|'.join(BY_NAME)})\b"
    + "".join(f"|(?P<{c.name}_>{re.escape(c.long_form)}\\b(?!\\.))" for c in COMMANDS)
)


def rewrite_commands(text: str, prog: str) -> str:
    """Writes all commands that a text mentions in the form in which the user started this one.

    Args:
        prog: as the user started this command, `jaxtrain plan` or `python -m jaxtrain.plan`.
    """
    words = prog.split()
    at = next((i for i, word in enumerate(words) if word in BY_NAME), len(words) - 1)
    base = "" if re.search(r" -m (jaxtrain|launch|pallas_kernels)\.", prog) else words[:at]

    def form(found):
        groups = found.groupdict()
        name = groups.pop("name") or next(key[:-1] for key, text in groups.items() if text)
        return " ".join([*base, name]) if base else BY_NAME[name].long_form

    return _MENTION.sub(form, text)
