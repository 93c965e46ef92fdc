#!/bin/bash
# SLURM: a batch script for sbatch, one process per node, which uses all GPUs of the node.
#
#     python -m launch.template slurm > train.sh
#     sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 train.sh \
#         --config=configs/gpt_124m.py --config.data.shards=DIR
#
# Run it in the project's working tree, which all nodes must see, with the environment's python
# first in PATH. Two minutes before the time limit SLURM sends SIGTERM: the run saves, ends with
# status 75 and is queued again to resume. Other failures are retried three times, except status
# 78: the same start would fail again. If the nodes share no folder, add
# --config.checkpoint.storage=host0 and pin the nodes.
#
# Ran on: SLURM 22.05 with CPU nodes (tests/test_launch_engines.py). Not run: with GPUs, and with
# preemption by the scheduler.

#SBATCH --job-name=jaxtrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

# --kill-on-bad-exit would kill the processes that end with 75 a second after the first, and turn
# the status into 143. A process whose peer has died ends by itself; --wait kills one that does not.
srun --kill-on-bad-exit=0 --wait=60 --unbuffered python -m jaxtrain.train "$@"
code=$?
if [ "$code" = 75 ] ||
    { [ "$code" != 0 ] && [ "$code" != 78 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; }; then
    echo "exit $code: queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
