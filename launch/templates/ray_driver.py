"""Ray: a driver that starts the training program once on each of several nodes of a Ray cluster.

    python -m launch.template ray > ray_driver.py
    ray job submit --working-dir=. -- python ray_driver.py --nodes=2 --gpus=8 -- \
        --config=configs/gpt_124m.py --config.data.shards=DIR --config.checkpoint.storage=host0

Ray places and starts the processes; the training program is the same and makes its own connections.
The driver exits with the first status that is not 0; 75 means that the run was saved and can be
started again. The code must be on every node: --working-dir sends it.

Ran on: Ray 2.60 with CPU nodes on one machine (tests/test_launch_ray.py, if ray is installed).
Not run: with GPUs, and on several machines.
"""

import argparse
import os
import socket
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


class Node:
    """One process of the job, on a node of its own."""

    def free_endpoint(self) -> str:
        """Returns this node's address and a free port on it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def run(self, flags: list[str], env: dict[str, str]) -> int:
        command = [sys.executable, "-m", "jaxtrain.train", *flags]
        return subprocess.run(command, env=os.environ | env).returncode


def world(coordinator: str, nodes: int, node: int) -> dict[str, str]:
    """Returns one process's variables, which jaxtrain/distributed/cluster.py reads."""
    return {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": str(nodes),
        "JAX_PROCESS_ID": str(node),
    }


def main() -> int:
    """Runs the job; returns its exit status."""
    parser = argparse.ArgumentParser(description="the flags of jaxtrain.train follow --")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each node")
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    ray.init()
    need = {"CPU": 1, "GPU": args.gpus} if args.gpus else {"CPU": 1}
    group = placement_group([need] * args.nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    actors = [
        ray.remote(Node)
        .options(
            num_cpus=1,
            num_gpus=args.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, i),
        )
        .remote()
        for i in range(args.nodes)
    ]
    coordinator = ray.get(actors[0].free_endpoint.remote())
    runs = [
        actor.run.remote(args.flags, world(coordinator, args.nodes, i))
        for i, actor in enumerate(actors)
    ]
    codes = ray.get(runs)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
