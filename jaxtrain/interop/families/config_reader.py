"""Reads config.json so that no field is overlooked: each is used, checked, or a fault."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jaxtrain.interop import InteropError

Path = tuple[str, ...]  # of a field: ("rope_parameters", "rope_theta")
LONGEST_VALUE = 80  # characters of a value in a message
MISSING: Any = object()


class Kind(NamedTuple):
    """Which values a field may have."""

    accepts: Callable[[Any], bool]
    words: str
    stand_in: Any  # replaces a faulty value, so that the fields after it are checked, too


SIZE = Kind(lambda x: type(x) is int and x >= 1, "a whole number of at least 1", 1)
COUNT = Kind(lambda x: type(x) is int and x >= 0, "a whole number of at least 0", 0)
NUMBER = Kind(lambda x: type(x) in (int, float) and abs(x) < 1e300, "a finite number", 1.0)
POSITIVE = Kind(lambda x: NUMBER.accepts(x) and x > 0, "a finite number above 0", 1.0)
FLAG = Kind(lambda x: type(x) is bool, "true or false", False)
TEXT = Kind(lambda x: type(x) is str, "a text", "")
LIST = Kind(lambda x: type(x) is list, "a list", [])
KINDS = {int: SIZE, float: NUMBER, bool: FLAG}


class ConfigReader:
    """The fields of one config.json, each of which must be read before `finish`.

    A field is named by its path: "hidden_size", or "rope_parameters.rope_theta" in a nested object.
    Faults are collected, and `finish` raises one error that lists them all.
    """

    def __init__(self, values: dict[str, Any]):
        self._values = values
        self._read: set[Path] = set()
        self._parents: set[Path] = set()  # of the fields read; null and {} mean none of them
        self.faults: list[str] = []

    def look(self, name: str) -> Any:
        """Returns the value of a field as it is stored, or MISSING, without counting it as read."""
        value: Any = self._values
        for key in name.split("."):
            value = value.get(key, MISSING) if isinstance(value, dict) else MISSING
        return value

    def get(self, name: str) -> Any:
        """Returns the value of a field as it is stored, or MISSING, and counts it as read."""
        path = tuple(name.split("."))
        self._read.add(path)
        self._parents |= {path[:i] for i in range(1, len(path))}
        return self.look(name)

    def take(self, *spellings: str, kind: Kind, default: Any = MISSING) -> Any:
        """Returns a field's value; spellings that contradict each other are a fault.

        Null counts as missing where another spelling has a value. If all are null, the result is
        None, but only where the default is None, too.

        Args:
            default: of a field that is missing. Without one, that is a fault.
        """
        given = {name: x for name in spellings if (x := self.get(name)) is not MISSING}
        values = {name: x for name, x in given.items() if x is not None}
        if not values:
            if not given and default is MISSING:
                self.faults.append(f"no {spellings[0]}")
            elif given and default is not None:
                self.faults.append(f"{next(iter(given))}=None (must be {kind.words})")
            else:
                return default
            return kind.stand_in
        first, *others = values
        for other in others:
            if values[other] != values[first]:
                self.faults.append(
                    f"{first}={shown(values[first])} and {other}={shown(values[other])}, which "
                    "contradict each other"
                )
        if not kind.accepts(values[first]):
            self.faults.append(f"{first}={shown(values[first])} (must be {kind.words})")
            return kind.stand_in
        return float(values[first]) if kind in (NUMBER, POSITIVE) else values[first]

    def expect(self, name: str, *accepted: Any) -> None:
        """Checks that a field is missing or has one of the accepted values."""
        value = self.get(name)
        if value is not MISSING and value not in accepted:
            words = " or ".join(map(repr, accepted))
            self.faults.append(f"{name}={shown(value)} (must be {words})")

    def ignore(self, names: Iterable[str]) -> None:
        """Counts fields as read that need no check."""
        self._read |= {(name,) for name in names}

    def has_read(self, name: str) -> bool:
        """Returns whether a field at the top level, or a part of it, was read."""
        return any(path[0] == name for path in self._read)

    def finish(self, owner: str, source: Any) -> None:
        """Raises InteropError with all faults, among them every field that was not read.

        Args:
            owner: whose fields were read, for the message: "LlamaForCausalLM".
            source: the file, for the message.
        """
        unread = {}
        for path, value in _leaves(self._values):
            is_empty_parent = path in self._parents and value in (None, {})
            prefixes = {path[:i] for i in range(1, len(path) + 1)}
            if not is_empty_parent and not prefixes & self._read:
                whole = not self.has_read(path[0])
                unread[path[0] if whole else ".".join(path)] = (
                    self._values[path[0]] if whole else value
                )
        reason = f"not a field that jaxtrain knows of {owner}"
        faults = self.faults + [f"{name}={shown(x)} ({reason})" for name, x in unread.items()]
        if faults:
            advice = " Remove the unknown ones from it if they change no logits." if unread else ""
            raise InteropError(
                f"{source} must describe what jaxtrain computes; got {'; '.join(faults)}.{advice}"
            )


def _leaves(value: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    for key, x in value.items():
        if isinstance(x, dict) and x:
            yield from _leaves(x, (*path, key))
        else:
            yield (*path, key), x


def shown(value: Any) -> str:
    """Returns a value for a message, cut to LONGEST_VALUE characters."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
