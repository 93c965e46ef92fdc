"""Finds the lines of an inventory's keys, which Python's parser of TOML does not report."""

import re
from collections.abc import Iterable

KEY_PART = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
KEY = rf"\s*({KEY_PART}(?:\s*\.\s*{KEY_PART})*)\s*"  # bare, quoted or dotted


class Places:
    """Finds the place of a key of the file, as `hosts.toml:7: host 'h1'`.

    Args:
        text: of the file, which must be valid TOML.
        source: the file's name.
    """

    def __init__(self, text: str, source: str):
        self._source = source
        self._lines: dict[tuple[str, int, str], int] = {}
        table, inner, counts = "", [], {}
        for number, line in enumerate(text.split("\n"), 1):  # TOML has no other end of a line
            header, key = re.match(rf"\s*\[\[?{KEY}\]", line), re.match(f"{KEY}=", line)
            if not (match := header or key):
                continue
            names = [part.strip("\"'") for part in re.findall(KEY_PART, match[1])]
            if header:
                table, *inner = names
                if not inner:  # [hosts.x] belongs to the host before it
                    counts[table] = counts.get(table, -1) + 1
                names = []
            path = inner + names
            here = (table, counts.get(table, 0), path[0] if path else "")
            self._lines.setdefault(here, number)
            if not table and len(path) > 1:  # defaults.port = 22
                self._lines.setdefault((path[0], 0, path[1]), number)

    def find(self, table: str = "", key: str = "") -> str:
        """Returns the place of a key of a table, or of the file."""
        return self._first([(table, 0, key), (table or key, 0, ""), ("", 0, table)])

    def find_host(self, index: int, name: str, key: str = "") -> str:
        """Returns the place of a host's key.

        A host that is an inline table has the line where the list of hosts begins.
        """
        ways = [("hosts", index, key), ("defaults", 0, key), ("hosts", index, "")]
        place = self._first([*ways, ("", 0, "hosts")])
        return f"{place}: host {ascii(name)}" if name else f"{place}: host number {index + 1}"

    def _first(self, ways: Iterable[tuple[str, int, str]]) -> str:
        line = next((self._lines[way] for way in ways if way in self._lines), 0)
        return f"{self._source}:{line}" if line else self._source
