"""What hosts and programs wrote reaches the terminal only through launch.terminal."""

import ast
import unicodedata
from pathlib import Path

import pytest

import launch
from launch.host.run_files import NAME
from launch.preflight import Finding, format_findings
from launch.terminal import visible

SOURCES = sorted(Path(launch.__file__).parent.glob("*.py"))
SOURCES += sorted((Path(launch.__file__).parent / "report").glob("*.py"))
# Characters of category Cf that belong to the letters of a script: marks of numbers and notes.
RARE = {"\u0890", "\u0891", "\u08e2", "\U000110bd", "\U000110cd"}
RARE |= {chr(code) for code in (*range(0x13430, 0x13440), *range(0x1BCA0, 0x1BCA4))}
RARE |= {chr(code) for code in range(0x1D173, 0x1D17B)}
# These print, or are run on a host, whose output is shown as a program's.
PRINTERS = ("terminal.py", "arguments.py", "collectives.py", "template.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_command_prints_by_itself(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [node.func.id for node in calls if isinstance(node.func, ast.Name)]
    assert "print" not in names or path.name in PRINTERS


def test_no_control_character_is_left_and_letters_of_all_scripts_stay():
    every = [chr(code) for code in range(0x110000)]
    changed = {character for character in every if visible(character) != character}
    control = {c for c in every if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs")}
    assert control - changed <= {"\t", *"\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f"} | RARE
    assert changed <= control | {chr(code) for code in (0x2065, *range(0xE0000, 0xE0080))}
    assert visible("".join(changed)).isascii()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[1;31mred\x1b[m", "\x1b[1;31mred\x1b[m\x1b[0m"),
        ("\x1b[38;5;8mgrey", "\x1b[38;5;8mgrey\x1b[0m"),
        ("\x1b[8mhidden", r"\x1b[8mhidden"),
        ("\x1b[31;8mhidden", r"\x1b[31;8mhidden"),
        ("\x1b[31", r"\x1b[31"),
        ("\x1b[2J\x1b[32mgreen", r"\x1b[2J" + "\x1b[32mgreen\x1b[0m"),
        ("plain", "plain"),
    ],
)
def test_only_sequences_that_choose_colours_are_kept(text, shown):
    assert visible(text, colours=True) == shown
    assert "\x1b" not in visible(text)


def test_a_host_cannot_add_a_line_to_the_table_of_checks():
    finding = Finding("h0", "python", "3.11\nok    all fine", "old\n\x1b[2J")
    lines = format_findings([finding]).split("\n")
    assert lines == [
        r"FAIL  python       3.11\nok    all fine",
        r"      h0: old\n\x1b[2J",
    ]


def test_a_file_of_a_run_has_a_plain_name():
    for name in ("config.json", "hosts/0.jsonl"):
        assert NAME.fullmatch(name)
    for name in ("../x.json", "hosts/../x.json", "/x.json", "\u202ex.json", "a\n.json", "x.py"):
        assert not NAME.fullmatch(name)
    assert not NAME.fullmatch("a" * 300 + ".json")
