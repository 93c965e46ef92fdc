"""Which process of which job this is, from the environment of whatever started it.

Explicit flags come first, then the JAX_* variables (set by launch.run, the Kubernetes and Ray
templates, or by hand), then the engines' own. `jax.distributed` is given the answer whole.
"""

import re
from typing import NamedTuple

PORT = 62_317  # of the coordinator, where an engine names a host and no port


class World(NamedTuple):
    engine: str = "alone"
    coordinator: str = ""  # host:port of process 0
    processes: int = 1
    process: int = 0
    local_devices: tuple[int, ...] | None = None  # None: all that this host has
    planned: int = 1  # processes that the batch was laid out for
    devices: int = 0  # that this process must find; 0: as many as there are


def detect_world(env) -> World:
    """The World that the environment variables `env` describe; World() where none is named.

    Raises:
        ValueError: an engine is named and its variables do not fit each other.
    """
    for engine, find in ENGINES.items():
        found = find(env)
        if found:
            try:
                world = World(engine, *found)
            except (TypeError, KeyError) as error:
                raise ValueError(f"{engine}'s variables are incomplete: {error}.") from error
            return check_world(world)
    return World()


def check_world(world: World) -> World:
    """The world, if its parts fit. Raises ValueError."""
    if world.processes == 1 and world.process == 0:
        return world
    host, _, port = world.coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 <= world.process < world.processes):
        raise ValueError(
            "several processes need the coordinator's host:port and 0 <= process < processes; got "
            f"coordinator={world.coordinator!r}, processes={world.processes}, "
            f"process={world.process} ({world.engine}). Set --coordinator, --processes, --process."
        )
    return world


def _explicit(env):
    if "JAX_NUM_PROCESSES" not in env:
        return None
    where = env.get("JAX_COORDINATOR_ADDRESS", "")
    if where and ":" not in where:
        where = f"{where}:{env.get('JAX_COORDINATOR_PORT', PORT)}"
    count = int(env["JAX_NUM_PROCESSES"])
    unknown = -1 if count > 1 else 0
    rank = env.get("JAX_PROCESS_ID", env.get("JOB_COMPLETION_INDEX", unknown))
    ids = env.get("JAX_LOCAL_DEVICE_IDS", "")
    local = tuple(int(i) for i in ids.split(",")) if ids else None
    planned = max(count, int(env.get("JAXTRAIN_PLANNED_PROCESSES", 0)))
    return where, count, int(rank), local, planned, int(env.get("JAXTRAIN_LOCAL_DEVICES", 0))


def _slurm(env):
    if "SLURM_STEP_NUM_TASKS" not in env or "SLURM_PROCID" not in env:
        if int(env.get("SLURM_JOB_NUM_NODES", 1)) > 1:
            raise ValueError(
                f"SLURM has given this job {env['SLURM_JOB_NUM_NODES']} nodes, and this process is "
                "on one of them alone. Start it by srun; JAX_NUM_PROCESSES=1 says that it is meant."
            )
        return None
    count, rank = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_PROCID"])
    port = 61_440 + int(env["SLURM_JOB_ID"]) % 4_096  # as JAX has it: other jobs' differ
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE", "1")
    alone = re.fullmatch(r"1(\(x\d+\))?", per_node)
    local = None if alone else (int(env["SLURM_LOCALID"]),)
    first = first_host(env["SLURM_STEP_NODELIST"])
    return f"{first}:{port}", count, rank, local, count


def first_host(nodes: str) -> str:
    """The first name of SLURM's list: `gpu[03-07,12],login` is gpu03."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+))?", nodes)
    return match[1] + (match[2] or "")


def _open_mpi(env):
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")  # 1734.0;tcp://10.0.0.1,10.1.0.1:43911
    match = re.search(r"tcp://([^,:]+)", uri)
    if not match:
        raise ValueError("Open MPI names no address of mpirun: set --coordinator=HOST:PORT.")
    count, rank = int(env["OMPI_COMM_WORLD_SIZE"]), int(env["OMPI_COMM_WORLD_RANK"])
    local_size = int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    local = None if local_size == 1 else (int(env["OMPI_COMM_WORLD_LOCAL_RANK"]),)
    job = int(uri.partition(".")[0] or 0) >> 16  # its lower half counts what one mpirun starts
    port = 61_440 + job % 4_096
    return f"{match[1]}:{port}", count, rank, local, count


def _skypilot(env):
    if "SKYPILOT_NODE_IPS" not in env:
        return None
    nodes = env["SKYPILOT_NODE_IPS"].split()
    return f"{nodes[0]}:{PORT}", len(nodes), int(env["SKYPILOT_NODE_RANK"]), None, len(nodes)


def _torchrun(env):
    if "MASTER_ADDR" not in env or "WORLD_SIZE" not in env:
        return None
    count, rank = int(env["WORLD_SIZE"]), int(env["RANK"])
    local = None if int(env.get("LOCAL_WORLD_SIZE", 1)) == 1 else (int(env["LOCAL_RANK"]),)
    # torchrun's own store listens on MASTER_PORT.
    return f"{env['MASTER_ADDR']}:{PORT}", count, rank, local, count


ENGINES = {
    "JAX_*": _explicit,
    "Open MPI": _open_mpi,  # before SLURM, whose srun starts mpirun's daemons in an allocation
    "SLURM": _slurm,
    "SkyPilot": _skypilot,
    "MASTER_ADDR": _torchrun,
}
