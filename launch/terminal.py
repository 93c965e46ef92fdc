"""Prints texts that contain what hosts and programs wrote, so that they cannot steer the terminal.

A program's output can contain escape sequences that set the clipboard (OSC 52) or the title (OSC
0), move the cursor, or overwrite earlier lines, and characters that reverse the order of a line.
"""

import re
import sys

from launch.arguments import print_text

# Sequences that choose colours, bold, italic or underlined text (ECMA-48, 8.3.117: SGR). 8, which
# hides text, is not among them.
COLOUR = r"\x1b\[(?:(?:[0-7]|[2-4]\d|9[0-7]|10[0-7]|38;5;\d{1,3}|48;5;\d{1,3})?;?){1,6}m"
# Control characters but for tab; invisible ones; those that reverse or break a line; surrogates.
UNSAFE = (
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_UNSAFE = re.compile(UNSAFE)
_COLOUR_OR_UNSAFE = re.compile(f"({COLOUR})|{UNSAFE}")
RESET = "\x1b[0m"


def visible(text: str, colours: bool = False) -> str:
    r"""Returns a line in which each unsafe character is written as its escape, such as `\x1b`.

    Args:
        colours: keep the sequences that only choose how letters look; they end with the line.
    """
    escape = lambda character: ascii(character)[1:-1]
    if not colours:
        return _UNSAFE.sub(lambda match: escape(match[0]), text)
    kept = _COLOUR_OR_UNSAFE.sub(lambda match: match[1] or escape(match[0]), text)
    return kept + RESET if "\x1b" in kept else kept


def visible_lines(text: str) -> str:
    """Returns a text of several lines, each as `visible` returns it."""
    return "\n".join(visible(line) for line in text.split("\n"))


def indented(text: str) -> str:
    """Returns a host's text with its further lines indented, so that they begin no line of ours."""
    return text.replace("\n", "\n    ")


def show(text: str) -> None:
    """Prints a text of one or more lines to standard output."""
    print_text(visible_lines(text))


def note(text: str) -> None:
    """Prints a line about the launcher's own progress, to standard error."""
    print(visible_lines(f"launch: {indented(text)}"), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Prints a text to standard error."""
    print(visible_lines(text), file=sys.stderr, flush=True)
