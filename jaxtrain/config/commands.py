"""The table of all commands: the name after `jaxtrain`, and the function that it calls.

Each command can be started in two ways, such as `jaxtrain train` and `python -m jaxtrain.train`.
Help texts and messages use the form in which the user started the current command.
"""

import re
from typing import NamedTuple


class Command(NamedTuple):
    """A command of `jaxtrain`.

    Attributes:
        name: the word after `jaxtrain`.
        start: what follows `python -m`: a module, and any words that precede the arguments.
        group: key of GROUPS.
        text: what it does.
        function: the module's function that runs it, called with (argv, prog).
    """

    name: str
    start: str
    group: str
    text: str
    function: str = "command"

    @property
    def module(self) -> str:
        return self.start.split()[0]

    @property
    def words(self) -> list[str]:
        return self.start.split()[1:]

    @property
    def long_form(self) -> str:
        """The command line that starts it without the installed script."""
        return f"python -m {self.start}"


COMMANDS = (
    Command("train", "jaxtrain.train", "train", "train the model that a config describes"),
    Command("encode", "jaxtrain.data.encode", "train", "turn text into token shards", "main"),
    Command("evaluate", "jaxtrain.evaluate", "train", "compute a run's held-out loss and tasks"),
    Command("branch", "jaxtrain.branching.branch", "train", "train on from a run's checkpoint"),
    Command("merge", "jaxtrain.branching.merge", "train", "average a run's checkpoints"),
    Command("generate", "jaxtrain.generate", "train", "sample text from a run"),
    Command("export", "jaxtrain.interop export", "train", "write a run for Hugging Face or llm.c"),
    Command("import", "jaxtrain.interop import", "train", "read Hugging Face or llm.c weights"),
    Command("summary", "launch.summary", "look", "report on a run as a table and a page", "main"),
    Command("compare", "launch.compare", "look", "compare runs on two kinds of device", "main"),
    Command("profile", "jaxtrain.profile", "look", "show where a step's time went", "main"),
    Command("plan", "jaxtrain.plan", "plan", "predict memory and time on any GPU"),
    Command("bench", "jaxtrain.bench", "plan", "time against PyTorch and hardware limits", "main"),
    Command("study", "jaxtrain.study", "plan", "compare optimizers on equal terms"),
    Command("ladder", "jaxtrain.ladder", "plan", "fit the loss over sizes and horizons"),
    Command("launch", "launch.run", "hosts", "train on several hosts over SSH", "main"),
    Command("slo", "launch.slo", "hosts", "compare runs with a baseline; price tokens", "main"),
    Command("doctor", "jaxtrain.doctor", "check", "check that this machine can train", "main"),
    Command("crosscheck", "jaxtrain.crosscheck", "check", "compare with PyTorch step by step"),
)
GROUPS = {
    "train": "Prepare data and train",
    "look": "Inspect runs",
    "plan": "Plan and measure",
    "hosts": "Several hosts",
    "check": "Check the installation",
}
BY_NAME = {command.name: command for command in COMMANDS}
# Matches both forms of a command. The regex group of a long form is called NAME_.
_MENTION = re.compile(
    rf"(?:python -m )?\bjaxtrain (?P<name>{'|'.join(BY_NAME)})\b"
    + "".join(f"|(?P<{c.name}_>{re.escape(c.long_form)}\\b(?!\\.))" for c in COMMANDS)
)


def rewrite_commands(text: str | None, prog: str) -> str:
    """Rewrites the commands in a text to the form in which the user started this command.

    Args:
        text: for instance a module's docstring; None gives "".
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
