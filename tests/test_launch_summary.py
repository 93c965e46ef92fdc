"""Run directories are read back and shown as a table and a page."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import bed as beds
import git_trees
import pytest
from run_directories import curve, series, write_run

from jaxtrain.metrics.step_log import read_step_times
from jaxtrain.metrics.step_timer import step_time_metrics
from jaxtrain.reporting.terminal import closing_lines
from launch import summary
from launch.host.run_files import flag_value, read_changes
from launch.pull import POSITIONS, RunCopy, write_at
from launch.report.figures import rows_of
from launch.report.page import page
from launch.report.run_folder import read_run
from launch.report.stats import percentile

VOID = {"meta"}


class Checked(HTMLParser):
    """Checks that every element is closed, and collects attributes and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "one", series(300), processes=4)
    write_run(folder / "two", series(300, 0.8, seed=1), curve(300, 1), log_every=10)
    write_run(folder / "cpu", series(30), chip=None)
    return [read_run(folder / name) for name in ("one", "two", "cpu")]


@pytest.mark.parametrize("count", [1, 3])
def test_the_page_is_well_formed_and_loads_no_external_resource(runs, count):
    text = page(runs[:count])
    found = Checked(text)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<img|<iframe", text)
    assert not [name for name, _ in found.attributes if name in ("src", "href", "xlink:href")]
    for name in ("Loss, nats a token", "Step times", "Where the time went", "Routes", "Versions"):
        assert any(name in words for words in found.words), name


def test_the_page_escapes_texts_that_come_from_the_run(tmp_path):
    hostile = "<script>alert(1)</script>&"
    folder = write_run(tmp_path / "<b>run", series(20), routes={hostile: hostile}, processes=2)
    found = json.loads((folder / "config.json").read_text())
    chip = found["chip"] | {"name": hostile}
    found |= {"config_hash": hostile, "versions": {hostile: hostile}, "chip": chip}
    (folder / "config.json").write_text(json.dumps(found))
    summary = {"step": 20, "stopped_by": hostile, "outliers": {hostile: hostile}}
    summary |= {"lost_s": {hostile: 3.0}, "perf/goodput": 0.5}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "hosts" / "0.jsonl").rename(folder / "hosts" / "<script>.jsonl")
    event = {"step": 9, "event": hostile, "cause": hostile}
    times = [{"step": step, "perf/step_time_s": 1.0} for step in range(20)]
    lines = "".join(json.dumps(line) + "\n" for line in [*times, event])
    (folder / "hosts" / "0.jsonl").write_text(lines)
    text = page([read_run(folder)])
    assert hostile in Checked(text).words and "<script" not in text and "<b>run" not in text
    assert text.count("&lt;script") >= 10
    read = read_run(folder)
    text = page([replace(read, config=read.config | {"devices": hostile}, hosts={}, metrics=[])])
    assert "<script" not in text


def test_every_polyline_stays_inside_its_chart(runs):
    found = Checked(page(runs))
    corners = [
        pair for name, value in found.attributes if name == "points" for pair in value.split()
    ]
    assert len(corners) > 500
    for corner in corners:
        x, y = map(float, corner.split(","))
        assert 0 <= x <= 360 and 0 <= y <= 190


def test_only_the_page_of_a_followed_run_reloads_itself(runs):
    assert 'http-equiv="refresh"' not in page(runs)
    assert ("content", "7") in Checked(page(runs, 7)).attributes


def test_figures_from_process_files_and_from_log_windows_agree(runs):
    times = series(300, seed=5)
    each = write_run(runs[0].folder.parent / "each", times, processes=2)
    windows = write_run(runs[0].folder.parent / "windows", times, log_every=10)
    each, windows = read_run(each), read_run(windows)
    assert "hosts/0.jsonl" in each.step_times[1] and "means of 10 steps" in windows.step_times[1]
    for metric in ("perf/tokens_per_s", "perf/step_time_s"):
        assert each.figures[metric] == pytest.approx(windows.figures[metric], rel=0.02)
    assert each.figures["perf/step_time_s"] == percentile(each.seconds, 0.5)


def test_the_trainers_closing_lines_and_the_page_show_the_same_step_times_and_rate(tmp_path):
    """Neither counts the first step after a start; the run was resumed once."""
    times = series(40, 0.03)
    times[0], times[20] = 3.0, 5.0
    folder = write_run(tmp_path / "run", times, processes=2)
    path = folder / "hosts" / "0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line | {"first": True} if line["step"] in (1, 21) else line for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokens = 512 * 1_024
    figures = step_time_metrics([*read_step_times(path).values()], tokens, 8)
    closing = closing_lines({"step": 40, "steps": 40} | figures)
    assert words_of(closing) == words_of_page(read_run(folder))
    assert figures["perf/step_time_p99_s"] < 1 and len(read_step_times(path)) == 38


def words_of(closing):
    """Returns p50, p95, p99 and tokens/s from a run's closing lines."""
    [line] = [line for line in closing if line.startswith("steps")]
    return re.fullmatch(r"steps p50 (.+?)  p95 (.+?)  p99 (.+?)  (.+?) tok/s", line).groups()


def words_of_page(run):
    """Returns p50, p95, p99 and tokens/s from the table of the page."""
    rows = dict(rows_of(run))
    names = ("step p50", "step p95", "step p99", "tokens/s, in steps")
    return tuple(rows[name].replace("\u202f", " ") for name in names)


def test_the_newest_scores_of_tasks_and_held_out_texts_are_rows_and_figures(tmp_path):
    folder = write_run(tmp_path / "run", series(20))
    for step, accuracy in ((10, 0.1), (20, 0.2712)):
        line = {"step": step, "time": 1.7e9 + step, "eval/loss_nats": 3.0, "eval/tokens": 9}
        line |= {"eval/arc_accuracy": accuracy, "eval/arc_accuracy_stderr": 0.019}
        line |= {"eval/arc_accuracy_norm": 0.5, "eval/words_accuracy": 1.0}
        line |= {
            "eval/web_loss_nats": 2.5,
            "eval/web_bits_per_byte": 1.25,
            "eval/nan_loss_nats": "nan",
        }
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    rows = dict(rows_of(run := read_run(folder)))
    assert rows["arc, accuracy"] == "27.1 ± 1.9 %" and rows["words, accuracy"] == "100.0 %"
    assert rows["web, held-out nats"] == "2.5000" and rows["web, bits/byte"] == "1.2500"
    assert not [name for name in rows if name.startswith(("nan", "arc_accuracy"))]
    assert summary.as_json(run)["eval/arc_accuracy_norm"] == 0.5
    assert "27.1 ± 1.9 %" in page([run])


def test_figures_that_were_not_measured_are_not_shown(runs):
    names = [name for name, _ in rows_of(runs[2])]
    assert not {"MFU, causal", "MBU"} & set(names) and "step p50" in names
    assert "MFU" not in page([runs[2]])


def test_a_repeated_step_counts_once_and_an_incomplete_line_is_ignored(tmp_path):
    run = write_run(tmp_path / "run", series(40), processes=2)
    before = read_run(run).figures
    lines = (run / "hosts" / "0.jsonl").read_text().splitlines(keepends=True)
    with open(run / "hosts" / "0.jsonl", "a") as file:
        file.write("".join(lines[-10:]) + lines[-1][:20])
    assert read_run(run).figures == before


def test_the_summary_of_an_earlier_start_is_ignored_once_the_run_was_resumed(tmp_path):
    run = write_run(tmp_path / "run", series(40))
    assert read_run(run).state == "done"
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "time": 1e9, "train/loss_nats": 3.0}\n')
    assert (read_run(run).state, read_run(run).step) == ("running", 41)  # whatever the clock says
    os.utime(run / "metrics.jsonl", (1e9, 1e9))
    assert read_run(run).state.startswith("silent for")


def test_processes_are_sorted_by_number_and_those_without_steps_have_no_row(tmp_path):
    run = write_run(tmp_path / "run", series(20), processes=12)
    (run / "hosts" / "11.jsonl").write_text('{"step": 0, "time": 1e9, "event": "start"}\n')
    assert list(read_run(run).hosts) == [str(i) for i in range(12)]
    text = page([read_run(run)])
    assert text.count('class="heat"') == 2 * 11 * 19


def test_stragglers_are_listed_with_their_host_and_steps_and_drawn(tmp_path):
    run = write_run(tmp_path / "run", series(40), processes=2, hosts=["h0", "<h1>"])
    assert "stragglers" not in dict(rows_of(read_run(run)))
    for process in range(2):
        with open(run / "hosts" / f"{process}.jsonl", "a") as file:
            for step in range(2, 40, 2):
                slow = ["data"] if process and 10 <= step < 20 else [] if step < 38 else "<odd>"
                probe = {"step": step, "event": "probe", "rank/compute_ratio": 1.0, "slow": slow}
                file.write(json.dumps(probe) + "\n")
    assert dict(rows_of(read_run(run)))["stragglers"] == "1 (<h1>) in data, steps 10 to 18"
    text = page([read_run(run)])
    assert "1 (&lt;h1&gt;) in data" in text and "A fixed computation" in text
    assert "probe" not in text  # a probe is no event of the timeline


def test_a_damaged_line_and_a_folder_without_a_run_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    assert summary.main(["nowhere"]) == 1
    assert "no folder is called 'nowhere', so it must be a job" in capsys.readouterr().err
    assert summary.main([str(tmp_path)]) == 1
    assert "DIR must be a run directory" in capsys.readouterr().err
    run = write_run(tmp_path / "run", series(20))
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("torn\n" + text)
    assert summary.main([str(run)]) == 1
    assert "metrics.jsonl, line 1 must be a JSON object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "status"),
    [
        ("config.json", '{"config": {"model": 5, "steps": "a"}, "data": {}}', 1),
        ("config.json", "[]", 1),
        ("config.json", None, 1),
        ("metrics.jsonl", None, 1),
        ("summary.json", None, 0),
        ("summary.json", "{torn", 0),
        ("summary.json", "[1]", 0),
    ],
)
def test_a_damaged_file_is_named_in_one_line(name, text, status, tmp_path, capsys):
    run = write_run(tmp_path / "run", series(20))
    (run / name).unlink()
    (run / name).mkdir() if text is None else (run / name).write_text(text)
    assert summary.main([str(run)]) == status
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1 and str(run / name) in printed
    assert printed.startswith("error: " if status else "warning: ")


def test_following_ends_when_the_run_ends(tmp_path):
    run = write_run(tmp_path / "run", series(20))
    ended = (run / "summary.json").read_text()
    (run / "summary.json").unlink()
    argv = [sys.executable, "-m", "launch.summary", str(run), "--follow", "--every=0.05", "--json"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    first = json.loads(process.stdout.readline())
    (run / "summary.json").write_text(ended)
    last = json.loads(process.communicate(timeout=20)[0].splitlines()[-1])
    assert first["state"] != "done" and last["state"] == "done" and process.returncode == 0
    assert last["perf/tokens_per_s"] == read_run(run).figures["perf/tokens_per_s"]


def test_a_copy_that_fetches_only_new_bytes_equals_the_original(tmp_path):
    """Also after growth, after replacement by a shorter file, and with size-limited answers."""
    run, copy, have, sent = write_run(tmp_path / "run", series(60)), tmp_path / "copy", {}, 0
    (copy / "hosts").mkdir(parents=True)
    content = (run / "metrics.jsonl").read_bytes()
    for change in ("none", "grown", "rewound"):
        if change == "grown":
            with open(run / "metrics.jsonl", "ab") as file:
                file.write(content)
        if change == "rewound":
            (run / "new").write_bytes(content[:5000])
            (run / "new").rename(run / "metrics.jsonl")
        more = True
        while more:
            answer = read_changes(run, have, {}, limit=3_000)
            more = answer["more"]
            for name, part in answer["files"].items():
                data = base64.b64decode(part["base64"])
                write_at(copy / name, part["at"], data)
                sent += len(data)
                have[name] = [part["inode"], part["at"] + len(data), part["tail"]]
        for name in ("config.json", "summary.json", "metrics.jsonl"):
            assert (copy / name).read_bytes() == (run / name).read_bytes()
    rest = sum((run / name).stat().st_size for name in ("config.json", "summary.json"))
    assert sent == rest + 2 * len(content) + 5000


def test_the_last_workdir_flag_names_the_run_directory():
    argv = ["--config.workdir=a", "--config.workdir", "b", "--config.steps=3"]
    assert flag_value(argv, "--config.workdir") == "b"
    assert flag_value([*argv, "--workdir=c"], "--config.workdir") == "c"
    assert flag_value(argv, "--config.data.text") == ""


PROGRAM = """
import os, shutil, sys
rank, workdir = os.environ["JAX_PROCESS_ID"], sys.argv[1].partition("=")[2]
os.makedirs(workdir + "/hosts")
shutil.copy(f"made/hosts/{rank}.jsonl", workdir + "/hosts")
for name in ("config.json", "metrics.jsonl", "summary.json") if rank == "0" else ():
    shutil.copy("made/" + name, workdir)
"""
no_bed = beds.available()


@pytest.mark.long
@pytest.mark.skipif(bool(no_bed), reason=no_bed)
def test_a_jobs_run_directory_is_collected_from_all_its_hosts(tmp_path, monkeypatch):
    """The hosts share no disk: the first has the run, the others only their processes' files."""
    code = tmp_path / "code"
    original = read_run(write_run(code / "made", series(60), processes=2))
    git_trees.commit_program(code, PROGRAM)
    shared = tmp_path / "shared"
    shutil.copytree(code / "made", shared / "one")
    with beds.Bed(2, shared) as bed:
        monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(bed.folder))
        hosts = bed.inventory(tmp_path / "hosts.toml")
        argv = [sys.executable, "-m", "tests.quick_hosts", f"--hosts={hosts}", f"--code={code}"]
        argv += [f"--ssh_config={bed.ssh_config}", "--module=program", "--restarts=0", "--"]
        done = subprocess.run([*argv, "--config.workdir=runs/one"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        [job] = os.listdir(tmp_path / "jobs")
        copy = read_run(RunCopy(job).fetch())
        shutil.rmtree(RunCopy(job).folder)
        pull = RunCopy(job, "/mnt/shared/one")
        assert read_run(pull.fetch()).hosts == original.hosts
        positions = json.loads((pull.folder / POSITIONS).read_text())
        assert len(positions["h0"]) == 5 and positions["h1"] == {}
    assert copy.figures == original.figures
    assert (copy.hosts, copy.config) == (original.hosts, original.config)
    assert "Step time by process" in page([copy])
