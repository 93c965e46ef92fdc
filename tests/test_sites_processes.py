"""A site of several processes, as real runs of the train command."""

import json

import pytest
from sites_scene import KEY, free_ports

import runs
from jaxtrain.sites.ledger import DECIDED, read_ledger

FLAGS = {"sites.period": 4, "sites.codec": "int4", "sites.on_loss": "fewer", "sites.fragments": 2}
FLAGS |= {"save_every": 6, "eval_tokens": 1_024, "sample.tokens": 0}
DEVICES = 2  # of a site


def train(folder, text, processes, steps):
    """Trains two sites, of which the first one has so many processes; returns their rounds."""
    folder.mkdir(exist_ok=True)
    counts, listed = {"a": processes, "b": 1}, []
    for name, count in counts.items():
        places = [{"address": "127.0.0.1", "port": port} for port in free_ports(count)]
        listed.append({"name": name, "processes": places})
    path = folder / "sites.json"
    path.touch(0o600)
    path.write_text(json.dumps({"version": 1, "job": "j", "key": KEY.hex(), "sites": listed}))
    flags = [f"--config.{name}={value}" for name, value in FLAGS.items()]
    flags += [f"--config.steps={steps}", f"--sites_file={path}"]
    started = [
        runs.fork(folder / name, text, *flags, f"--site={name}", *own, devices=DEVICES // count)
        for name, count in counts.items()
        for own in (runs.flags_of_processes(count) if count > 1 else [[]])
    ]
    for process in started:
        runs.finish(process)
    lines = {name: read_ledger(folder / name / "sites.jsonl") for name in counts}
    # After the last step the fragments' rounds are applied in the order in which they arrive.
    decided = lambda x: [getattr(x, name) for name in DECIDED]
    return {name: {x.place: decided(x) for x in found} for name, found in lines.items()}


@pytest.mark.long
def test_a_site_of_two_processes_trains_saves_and_resumes_as_one_of_one_process(tmp_path):
    """The checksums of codes and references are those of whole fragments, so weights are equal."""
    text = runs.write_text(tmp_path)
    ends = []
    for processes in (2, 1):
        folder = tmp_path / str(processes)
        first = train(folder, text, processes, steps=6)  # the last round has fewer steps
        found = train(folder, text, processes, steps=9)
        assert found["a"] == found["b"] and found["a"] | first["a"] == found["a"]
        assert len(first["a"]) == 4 and len(found["a"]) > 6
        ends.append(found)
    assert ends[0] == ends[1]
