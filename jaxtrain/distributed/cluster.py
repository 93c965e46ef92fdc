"""Detects which process of which job this is, from environment variables of the cluster's engine.

The JAX_* variables take precedence: launch.run, the Kubernetes and Ray templates, or the user set
them. Open MPI, SLURM, SkyPilot and torchrun follow. All arguments of `jax.distributed.initialize`
are decided here; its own cluster detection is off.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

PORT = 62_317  # the coordinator's port if the engine names a host but no port
# Jobs that share a host need different ports: 61,440 + (the job's number modulo 4,096), as in JAX.
FIRST_PORT, PORTS = 61_440, 4_096

Environment = Mapping[str, str]


class World(NamedTuple):
    """All processes of a job, and which of them this one is.

    Attributes:
        engine: what started the processes, such as "SLURM"; "alone" for a single process.
        coordinator: host:port of process 0.
        processes: how many there are.
        process: index of this one.
        local_devices: indices of the host's devices that this process uses; None uses all.
        planned: how many processes the job was planned with; it may now run with fewer.
        devices: number of devices that this process must find; 0 accepts any number.
        heartbeat_s: JAX ends all processes if one is silent for longer, by death, network outage or
            a signal that stops it. Each sends heartbeats at half this interval.
    """

    engine: str = "alone"
    coordinator: str = ""
    processes: int = 1
    process: int = 0
    local_devices: tuple[int, ...] | None = None
    planned: int = 1
    devices: int = 0
    heartbeat_s: int = 20


def detect_world(env: Environment) -> World:
    """Returns the World that environment variables describe; World() if no engine set any.

    Raises:
        ValueError: an engine's variables are incomplete or contradict each other.
    """
    for engine, find in ENGINES.items():
        try:
            world = find(env)
        except KeyError as error:
            raise ValueError(f"{engine} must set {error}, which is missing.") from error
        if world is not None:
            return check_world(world._replace(engine=engine))
    return World()


def check_world(world: World) -> World:
    """Returns the world; raises ValueError if several processes lack a coordinator or an index."""
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


def _world(
    coordinator: str, processes: int, process: int, local_devices: tuple[int, ...] | None
) -> World:
    return World("", coordinator, processes, process, local_devices, planned=processes)


def _from_jax_variables(env: Environment) -> World | None:
    if "JAX_NUM_PROCESSES" not in env:
        return None
    coordinator = env.get("JAX_COORDINATOR_ADDRESS", "")
    if coordinator and ":" not in coordinator:
        coordinator = f"{coordinator}:{env.get('JAX_COORDINATOR_PORT', PORT)}"
    processes = int(env["JAX_NUM_PROCESSES"])
    unknown = "-1" if processes > 1 else "0"  # check_world refuses -1
    process = env.get("JAX_PROCESS_ID", env.get("JOB_COMPLETION_INDEX", unknown))
    ids = env.get("JAX_LOCAL_DEVICE_IDS", "")
    return World(
        coordinator=coordinator,
        processes=processes,
        process=int(process),
        local_devices=tuple(int(i) for i in ids.split(",")) if ids else None,
        planned=max(processes, int(env.get("JAXTRAIN_PLANNED_PROCESSES", 0))),
        devices=int(env.get("JAXTRAIN_LOCAL_DEVICES", 0)),
        heartbeat_s=int(env.get("JAXTRAIN_HEARTBEAT_S", World().heartbeat_s)),
    )


def _from_slurm(env: Environment) -> World | None:
    if "SLURM_STEP_NUM_TASKS" not in env or "SLURM_PROCID" not in env:
        if int(env.get("SLURM_JOB_NUM_NODES", 1)) > 1:
            raise ValueError(
                "SLURM must start a process on each node of this job; got one process for "
                f"{env['SLURM_JOB_NUM_NODES']} nodes. Start it by srun, or set JAX_NUM_PROCESSES=1 "
                "to use one node only."
            )
        return None
    port = FIRST_PORT + int(env["SLURM_JOB_ID"]) % PORTS
    one_per_node = re.fullmatch(r"1(\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return _world(
        f"{first_host(env['SLURM_STEP_NODELIST'])}:{port}",
        int(env["SLURM_STEP_NUM_TASKS"]),
        int(env["SLURM_PROCID"]),
        None if one_per_node else (int(env["SLURM_LOCALID"]),),
    )


def first_host(nodes: str) -> str:
    """Returns the first host of a list in SLURM's notation: `gpu[03-07,12],login` is gpu03."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+))?", nodes)
    assert match  # the pattern matches any text
    return match[1] + (match[2] or "")


def _from_open_mpi(env: Environment) -> World | None:
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")  # 1734.0;tcp://10.0.0.1,10.1.0.1:43911
    match = re.search(r"tcp://([^,:]+)", uri)
    if not match:
        raise ValueError(
            "Open MPI must set mpirun's address in OMPI_MCA_orte_hnp_uri; got "
            f"{uri!r}. Set --coordinator=HOST:PORT, --processes and --process."
        )
    job = int(uri.partition(".")[0] or 0) >> 16  # the lower 16 bits count what mpirun has started
    return _world(
        f"{match[1]}:{FIRST_PORT + job % PORTS}",
        int(env["OMPI_COMM_WORLD_SIZE"]),
        int(env["OMPI_COMM_WORLD_RANK"]),
        _local_device(env, "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    )


def _from_skypilot(env: Environment) -> World | None:
    if "SKYPILOT_NODE_IPS" not in env:
        return None
    nodes = env["SKYPILOT_NODE_IPS"].split()
    return _world(f"{nodes[0]}:{PORT}", len(nodes), int(env["SKYPILOT_NODE_RANK"]), None)


def _from_torchrun(env: Environment) -> World | None:
    if "MASTER_ADDR" not in env or "WORLD_SIZE" not in env:
        return None
    return _world(
        f"{env['MASTER_ADDR']}:{PORT}",  # torchrun's own store listens on MASTER_PORT
        int(env["WORLD_SIZE"]),
        int(env["RANK"]),
        _local_device(env, "LOCAL_WORLD_SIZE", "LOCAL_RANK"),
    )


def _local_device(env: Environment, size: str, rank: str) -> tuple[int] | None:
    """Returns the device of this process if several share the host, one device each."""
    return None if int(env.get(size, 1)) == 1 else (int(env[rank]),)


ENGINES: dict[str, Callable[[Environment], World | None]] = {
    "JAX_*": _from_jax_variables,
    # Before SLURM: in an allocation, mpirun's daemons run as a SLURM step, so the processes that
    # they start have the variables of both.
    "Open MPI": _from_open_mpi,
    "SLURM": _from_slurm,
    "SkyPilot": _from_skypilot,
    "MASTER_ADDR": _from_torchrun,
}
