"""Renders the page of one or more runs: one HTML file without scripts or external resources."""

import time
from html import escape

from launch.report import panels
from launch.report.figures import latest, progress, rows_of, seconds
from launch.report.run_folder import LOSS, STEP_TIME, RunFolder
from launch.report.svg import COLOURS, short

STYLE = """
:root{color-scheme:light dark;--paper:#f7f7f5;--card:#fff;--ink:#1b1f24;--dim:#59626d;
--grid:#e4e6e9;--c1:#1f5fa8;--c2:#ad4a12;--c3:#256f42;--c4:#74479b;--c5:#806400;--c6:#0b6f76}
@media(prefers-color-scheme:dark){:root{--paper:#0f1215;--card:#171b20;--ink:#dde2e7;--dim:#98a3ae;
--grid:#2a3037;--c1:#7fb2ee;--c2:#f0a46a;--c3:#7ccf9b;--c4:#c6a5ea;--c5:#dcc15a;--c6:#69c9cf}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1160px;padding:14px;background:var(--paper);color:var(--ink);
font:16px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
h1{font-size:22px;line-height:1.2;margin:4px 0;overflow-wrap:anywhere}
h2{font-size:15px;font-weight:600;margin:0 0 6px}
p{margin:4px 0}
.dim,figcaption{color:var(--dim);font-size:14px}
figcaption{margin-top:4px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(104px,1fr));gap:8px;margin:12px 0}
.tiles div,section{background:var(--card);border:1px solid var(--grid);border-radius:8px;
padding:10px 12px;min-width:0}
.tiles b{display:block;font-size:20px;font-weight:600;white-space:nowrap}
.tiles span{font-size:13px;color:var(--dim)}
main,aside{display:grid;align-items:start;gap:10px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr))}
aside{margin-top:10px}
section{padding:12px}
figure{margin:0}
svg{display:block;width:100%;max-width:560px;height:auto}
svg text{font-size:12px;fill:var(--ink)}
svg .tick{fill:var(--dim);font-size:11.5px}
.grid,.axis{stroke:var(--grid);fill:none}
.mark{stroke:var(--dim);stroke-dasharray:2 2;fill:none}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.faint{fill:none;stroke-width:1;stroke-opacity:.35}
.bars{fill-opacity:.22;stroke-width:1.2}
.heat{fill:var(--c1)}
.f0{fill:var(--dim)}
.b0{background:var(--dim)}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{padding:3px 0;text-align:right;vertical-align:top;border-top:1px solid var(--grid);
font-weight:400}
tr:first-child>*{border-top:0}
th{text-align:left;color:var(--dim);padding-right:12px}
thead th{text-align:right;color:var(--ink);overflow-wrap:anywhere}
td{white-space:nowrap;padding-left:8px}
td.words{text-align:left;white-space:normal;overflow-wrap:anywhere}
.names th{width:1%;white-space:nowrap}
.key{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
.wide{overflow-x:auto}
.many{font-size:13px}
""" + "".join(
    f".k{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}svg .c{i}{{fill:var(--c{i})}}"
    f".b{i}{{background:var(--c{i})}}"
    for i in range(1, COLOURS + 1)
)


def page(runs: list[RunFolder], refresh_s: int = 0) -> str:
    """Returns the HTML of a page.

    Args:
        refresh_s: seconds after which a browser reloads the page; 0 for never.
    """
    single = len(runs) == 1
    title = runs[0].name if single else f"{len(runs)} runs"
    refresh = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
    body = _head(runs[0]) if single else _legend(runs)
    body += f"<main>{''.join(_charts(runs))}</main><aside>{''.join(_tables(runs))}</aside>"
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    body += f'<p class="dim">Written {written} by launch.summary.</p>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"{refresh}<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def _head(run: RunFolder) -> str:
    found = run.figures
    tiles = []
    for value, name, form in (
        (latest(run, LOSS), "loss, nats", lambda x: f"{x:.3f}"),
        (found.get("perf/tokens_per_s"), "tokens/s", short),
        (found.get(STEP_TIME), "step p50", seconds),
        (found.get("perf/mfu"), "MFU", lambda x: f"{100 * x:.1f} %"),
        (found.get("perf/goodput"), "goodput", lambda x: f"{100 * x:.0f} %"),
    ):
        if value is not None:
            tiles.append(f"<div><b>{form(value)}</b><span>{name}</span></div>")
    return (
        f"<h1>{escape(run.name)}</h1><p>{escape(run.state)}, step {escape(progress(run))}</p>"
        f'<p class="dim">{escape(f"{run.devices} x {run.device}, config {run.config_hash}")}</p>'
        f'<div class="tiles">{"".join(tiles)}</div>'
    )


def _legend(runs) -> str:
    lines = ""
    for i, run in enumerate(runs):
        key = f'<span class="key b{i % COLOURS + 1}"></span>'
        state = f'<span class="dim">{escape(run.state)}, step {escape(progress(run))}</span>'
        lines += f"<p>{key}{escape(run.name)} {state}</p>"
    return f"<h1>{len(runs)} runs</h1>{lines}"


def _charts(runs):
    yield panels.loss(runs)
    yield panels.timeline(runs)
    yield panels.times(runs)
    yield panels.throughput(runs)
    yield panels.utilisation(runs)
    yield panels.bandwidth(runs)
    for run in runs:
        name = f": {run.name}" if len(runs) > 1 else ""
        yield panels.goodput(run, name)
        yield from panels.heat(run, name)


def _tables(runs):
    yield _figures(runs)
    for run in runs:
        name = f": {run.name}" if len(runs) > 1 else ""
        yield _words(f"Routes{name}", run.config.get("routes", {}), strip=True)
        yield _words(f"Versions{name}", run.config["versions"])


def _figures(runs) -> str:
    tables = [dict(rows_of(run)) for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    head = many = ""
    if len(runs) > 1:
        many = ' class="many"'
        keys = [f'<span class="key b{i % COLOURS + 1}"></span>' for i in range(len(runs))]
        pairs = zip(keys, runs, strict=True)
        cells = "".join(f"<th>{key}{escape(run.name)}</th>" for key, run in pairs)
        head = f"<thead><tr><th></th>{cells}</tr></thead>"
    body = ""
    for name in names:
        cells = "".join(f"<td>{escape(table.get(name, '-'))}</td>" for table in tables)
        body += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    return panels.section("Figures", f'<div class="wide"><table{many}>{head}{body}</table></div>')


def _words(title, entries, strip=False) -> str:
    """Returns a table of names and texts; strips the route's name from the start of its text."""
    body = ""
    for name, text in entries.items():
        text = " ".join(str(text).split())
        text = text.removeprefix(name).strip() if strip else text
        body += f'<tr><th>{escape(name)}</th><td class="words">{escape(text)}</td></tr>'
    return panels.section(title, f'<table class="names">{body}</table>') if body else ""
