from jaxtrain.reporting.table import format_table

ROWS = [{"name": "[a]", "ms": "9.5"}, {"name": "a longer name", "ms": "-10.25"}]
COLUMNS = {"name": lambda row: row["name"], "ms": lambda row: row["ms"]}


def test_numbers_align_right_and_text_left():
    assert format_table(ROWS, COLUMNS).splitlines() == [
        "name               ms",
        "[a]               9.5",
        "a longer name  -10.25",
    ]


def test_a_column_of_numbers_with_a_missing_value_aligns_right():
    rows = [("a", "", "1x8"), ("b", "12,345", "4x2"), ("c", "not reached", "16x1")]
    assert format_table(rows, ["name", "steps", "mesh"], indent=2, left=["mesh"]).splitlines() == [
        "  name        steps  mesh",
        "  a                  1x8",
        "  b          12,345  4x2",
        "  c     not reached  16x1",
    ]


def test_long_rows_are_neither_wrapped_nor_coloured_whatever_the_environment(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    rows = [("x" * 300, "y" * 300), ("漢" * 100, "")]
    lines = format_table(rows, ["first", "second"]).splitlines()
    assert lines[1] == "x" * 300 + "  " + "y" * 300
    assert lines[2] == "漢" * 100
    assert not any("\x1b" in line for line in lines)


def test_a_table_without_rows_is_its_header():
    assert format_table([], COLUMNS) == "name  ms"
