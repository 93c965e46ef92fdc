import pytest

from jaxtrain.distributed.cluster import World, detect_world, first_host

SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_MCA_orte_hnp_uri": "3195404288.0;tcp://10.0.0.1,10.9.0.1:43911",
}


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, World()),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            World("JAX_*", "a:1", 2, 1, None, 2),
        ),
        (  # the Kubernetes template, where the process is the index of the job's pod
            {
                "JAX_COORDINATOR_ADDRESS": "train-workers-0-0.train",
                "JAX_COORDINATOR_PORT": "8476",
                "JAX_NUM_PROCESSES": "4",
                "JOB_COMPLETION_INDEX": "3",
            },
            World("JAX_*", "train-workers-0-0.train:8476", 4, 3, None, 4),
        ),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
            World("SLURM", "gpu07:61443", 4, 3, (1,), 4),
        ),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"},
            World("SLURM", "gpu07:61443", 4, 3, None, 4),
        ),
        (MPI, World("Open MPI", "10.0.0.1:65142", 3, 2, None, 3)),  # 61,440 + 48,758 % 4,096
        (
            {"SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_NODE_RANK": "1"},
            World("SkyPilot", "10.0.0.5:62317", 2, 1, None, 2),
        ),
        (
            {"MASTER_ADDR": "m", "WORLD_SIZE": "2", "RANK": "0"},
            World("MASTER_ADDR", "m:62317", 2, 0, None, 2),
        ),
    ],
)
def test_the_world_is_detected_from_the_variables_of_each_engine(env, world):
    assert detect_world(env) == world


def test_the_launchers_number_of_devices_and_its_heartbeat_limit_are_read():
    env = {"JAX_NUM_PROCESSES": "1", "JAXTRAIN_LOCAL_DEVICES": "8"}
    assert detect_world(env | {"JAXTRAIN_HEARTBEAT_S": "60"}).heartbeat_s == 60
    assert detect_world(env) == World("JAX_*", "", 1, 0, None, 1, 8)


def test_the_jax_variables_come_before_those_of_engines():
    env = SLURM | MPI | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    assert detect_world(env).engine == "JAX_*"


def test_mpirun_inside_a_slurm_allocation_is_detected_as_open_mpi():
    """mpirun's daemons run as a SLURM step, so its processes have the variables of both."""
    assert detect_world(SLURM | MPI) == detect_world(MPI) != detect_world(SLURM)


def test_a_slurm_job_without_srun_may_have_one_node_only():
    batch = {"SLURM_JOB_ID": "3", "SLURM_PROCID": "0"}
    assert detect_world(batch | {"SLURM_JOB_NUM_NODES": "1"}) == World()
    with pytest.raises(ValueError, match="Start it by srun"):
        detect_world(batch | {"SLURM_JOB_NUM_NODES": "2"})
    assert (
        detect_world(batch | {"SLURM_JOB_NUM_NODES": "2", "JAX_NUM_PROCESSES": "1"}).processes == 1
    )


def test_incomplete_variables_are_refused():
    with pytest.raises(ValueError, match="process=-1"):
        detect_world({"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-07,12],login", "gpu03"), ("a", "a"), ("h[1,5]", "h1"), ("x,y", "x")],
)
def test_the_first_host_of_slurms_notation_is_found(nodes, first):
    assert first_host(nodes) == first
