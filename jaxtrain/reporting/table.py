"""Tables as text: aligned columns with numbers to the right."""


def format_table(rows: list[dict], columns: dict) -> str:
    """Aligned columns, numbers to the right; columns: header -> function(row) -> text."""
    aligned = []
    for header, show in columns.items():
        cells = [header, *map(show, rows)]
        width = max(map(len, cells))
        number = cells[1][:1].isdigit()
        aligned.append([c.rjust(width) if number else c.ljust(width) for c in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))
