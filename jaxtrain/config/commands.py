"""The table of all commands: the name after `jaxtrain`, and the function that it calls.

Each command can be started in two ways, such as `jaxtrain train` and `python -m jaxtrain.train`.
Help and messages use the way in which the user has started the current one.
"""

import re
from typing import NamedTuple


class Command(NamedTuple):
    """A command.

    Attributes:
        name: the word after `jaxtrain`.
        module: the module that `python -m` starts.
        function: the module's function that runs it, called with (argv, prog).
        group: key of GROUPS.
        text: what it does.
        words: words that precede its arguments if it is started by `python -m`.
    """

    name: str
    module: str
    function: str
    group: str
    text: str
    words: tuple[str, ...] = ()

    @property
    def long_form(self) -> str:
        """The words that start it without the installed script."""
        return " ".join(["python -m", self.module, *self.words])


COMMANDS = (
    Command("train", "jaxtrain.train", "command", "train", "train the model of a config"),
    Command("encode", "jaxtrain.data.encode", "main", "train", "turn text into token shards"),
    Command("evaluate", "jaxtrain.evaluate", "command", "train", "compute a run's held-out loss"),
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
        "start a run from weights of Hugging Face or llm.c",
        ("import",),
    ),
    Command("summary", "launch.summary", "main", "look", "report on a run: a table and a page"),
    Command("compare", "launch.compare", "main", "look", "compare runs on two kinds of device"),
    Command("profile", "jaxtrain.profile", "main", "look", "show where a traced step's time went"),
    Command("plan", "jaxtrain.plan", "command", "plan", "predict memory and time on any GPU"),
    Command("bench", "jaxtrain.bench", "main", "plan", "time training against PyTorch and peaks"),
    Command("study", "jaxtrain.study", "command", "plan", "compare optimizers on equal terms"),
    Command("launch", "launch.run", "main", "hosts", "train on several hosts over SSH"),
    Command("slo", "launch.slo", "main", "hosts", "check runs against a baseline; price tokens"),
    Command("doctor", "jaxtrain.doctor", "main", "check", "check that this machine can train"),
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
# Matches both forms of a command. A long form's group is the command's name and an underscore.
_MENTION = re.compile(
    rf"(?:python -m )?\bjaxtrain (?P<name>{'|'.join(BY_NAME)})\b"
    + "".join(f"|(?P<{c.name}_>{re.escape(c.long_form)}\\b(?!\\.))" for c in COMMANDS)
)


def rewrite_commands(text: str | None, prog: str) -> str:
    """Rewrites the commands that a text mentions in the form in which the user started this one.

    Args:
        text: such as a module's docstring; None gives "".
        prog: how the user started this command: `jaxtrain plan` or `python -m jaxtrain.plan`.
    """
    words = prog.split()
    name_index = next((i for i, word in enumerate(words) if word in BY_NAME), len(words) - 1)
    long_form = re.search(r" -m (jaxtrain|launch|pallas_kernels)\.", prog)
    program = [] if long_form else words[:name_index]

    def rewrite(match: re.Match) -> str:
        groups = match.groupdict()
        name = groups.pop("name") or next(key[:-1] for key, text in groups.items() if text)
        return " ".join([*program, name]) if program else BY_NAME[name].long_form

    return _MENTION.sub(rewrite, text or "")
