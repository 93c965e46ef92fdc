#!/bin/bash
# SLURM: a batch script for sbatch, one process a node, which takes all the node's GPUs.
#
#     python -m launch.template slurm > train.sh
#     sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 train.sh \
#         --config=configs/gpt_124m.py --config.data.shards=DIR
#
# Run on the project's working tree, which all nodes must see, with its environment's python first
# in PATH. Two minutes before the time limit SLURM asks for the end: the run saves, ends with 75,
# and is queued again to go on from there. Other failures are tried again three times; 78 says that
# the same start would fail again. Without a folder that all nodes share, add
# --config.checkpoint.storage=host0 and pin the nodes.
#
# Ran on: SLURM 22.05 with CPU nodes (tests/test_launch_engines.py). Not run: with GPUs, with a
# scheduler's own preemption.

#SBATCH --job-name=jaxtrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

# Not --kill-on-bad-exit: processes that leave with 75 do so a second apart, and a killed one would
# make it 143. A process whose peer has died ends by itself; --wait ends one that does not.
srun --kill-on-bad-exit=0 --wait=60 --unbuffered python -m jaxtrain.train "$@"
code=$?
if [ "$code" = 75 ] ||
    { [ "$code" != 0 ] && [ "$code" != 78 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; }; then
    echo "exit $code: queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
