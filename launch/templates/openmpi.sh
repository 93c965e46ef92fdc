#!/bin/bash
# Open MPI: mpirun over ssh, one process per host, which uses all GPUs of the host.
#
#     python -m launch.template openmpi > train.sh
#     HOSTS=a40-1,a40-2 NETWORK=10.0.0.0/24 bash train.sh \
#         --config=configs/gpt_124m.py --config.data.shards=DIR
#
# Run it on the first of HOSTS, which becomes JAX's coordinator, in the project's working tree.
# This folder and the environment's python must have the same path on every host. NETWORK is the
# subnet or the interface of the training network. After Ctrl-C or SIGTERM to this script the run
# saves and ends with status 75; the same command resumes it. SIGTERM to mpirun saves nothing:
# mpirun kills the run a second later. If the hosts share no folder, add
# --config.checkpoint.storage=host0.
#
# Ran on: Open MPI 4.1.4 with CPU hosts (tests/test_launch_engines.py). Not run: with GPUs.
set -u
: "${HOSTS:?set HOSTS=first,second: names for ssh}" "${NETWORK:?set NETWORK: subnet or interface}"
IFS=, read -ra hosts <<< "$HOSTS"
options=(
    -np "${#hosts[@]}" --host "$HOSTS" --map-by ppr:1:node
    --bind-to none # otherwise each process computes on one core
    --mca oob_tcp_if_include "$NETWORK" --mca btl self,tcp --mca btl_tcp_if_include "$NETWORK"
    --wdir "$PWD" -x PATH -x PYTHONPATH="${PYTHONPATH:-$PWD}" -x PYTHONUNBUFFERED=1
)
setsid mpirun "${options[@]}" "$(command -v python)" -m jaxtrain.train "$@" &
mpirun=$!
trap 'pkill -TERM -P "$mpirun" -f jaxtrain.train' INT TERM # the other hosts follow
while kill -0 "$mpirun" 2> /dev/null; do
    wait "$mpirun"
    code=$?
done
exit "$code"
