"""Trains under real SLURM and Open MPI on a test bed, with the shipped templates."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import bed as beds
import jax
import pytest
import slurm_bed
import xla_flags

import runs
from configs import debug
from jaxtrain.config import train_config as config_lib
from jaxtrain.train import train
from launch.template import read_template

ROOT = Path(__file__).parent.parent
no_slurm = slurm_bed.available()
no_mpi = beds.available() or ("" if shutil.which("mpirun") else "mpirun is not installed")
SETTINGS = {
    "steps": 3,
    "sample.tokens": 0,
    "data.batch": 4,
    "model.L": 1,
    "optim.name": "adamw",
    "mesh.fsdp": 1,
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder for all hosts, with a text and the run of a single process."""
    folder = tmp_path_factory.mktemp("shared")
    config = debug.get_config()
    text = runs.write_text(folder)
    config.update_from_flattened_dict(SETTINGS | {"data.text": str(text)})
    config.workdir, config.compile_cache = str(folder / "single"), ""
    assert train(config_lib.freeze(config), jax.devices()[:1], quiet=True) == 0
    return folder


def flags(name):
    settings = SETTINGS | {"mesh.replica": -1, "compile_cache": "/mnt/shared/xla"}
    settings |= {"data.text": "/mnt/shared/text.txt", "workdir": f"/mnt/shared/{name}"}
    return ["--config=configs/debug.py"] + [f"--config.{k}={v}" for k, v in settings.items()]


def run_on_first(bed, *argv, **env):
    """Runs a command on h0, with this Python and the working tree; returns what it prints."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | env
    env["XLA_FLAGS"] = xla_flags.QUICK
    command = bed.inside("h0", "env", "-C", ROOT, *argv)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, env=env, timeout=200, **output)
    assert done.returncode == 0, done.stdout
    return done.stdout


def check_losses(shared, name, out, engine):
    """Checks that a run of two processes has the losses of the single one."""
    assert f"process 1 of 2 ({engine})" in out, out
    losses, single = (dict(runs.losses(shared / run)) for run in (name, "single"))
    assert losses == pytest.approx(single, abs=1e-5) and list(losses) == [1, 2, 3]


@pytest.mark.long
@pytest.mark.skipif(bool(no_slurm), reason=no_slurm)
def test_two_slurm_nodes_have_the_losses_of_one_process(shared):
    (shared / "train.sh").write_text(read_template("slurm"))
    with slurm_bed.SlurmBed(2, shared) as bed:
        log = shared / "slurm.out"
        submit = ["sbatch", "--parsable", "--output=/mnt/shared/slurm.out", "/mnt/shared/train.sh"]
        job = run_on_first(bed, *submit, *flags("slurm")).strip()
        assert bed.end_of(job, 200) == "COMPLETED", log.read_text()
        check_losses(shared, "slurm", log.read_text(), "SLURM")


@pytest.mark.long
@pytest.mark.skipif(bool(no_mpi), reason=no_mpi)
def test_two_mpirun_hosts_have_the_losses_of_one_process(shared):
    (shared / "mpi.sh").write_text(read_template("openmpi"))
    with beds.Bed(2, shared) as bed:
        out = run_on_first(
            bed,
            *("bash", "/mnt/shared/mpi.sh", *flags("mpi")),
            HOSTS="h0,h1",
            NETWORK="lan0",
            OMPI_MCA_plm_rsh_agent=f"ssh -F {bed.ssh_config}",
            OMPI_ALLOW_RUN_AS_ROOT="1",
            OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
        )
        check_losses(shared, "mpi", out, "Open MPI")
