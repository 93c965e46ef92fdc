#!/bin/bash
# torchrun, or another launcher that sets MASTER_ADDR, WORLD_SIZE and RANK: one process per host.
#
#     python -m launch.template torchrun > train.sh
#     HEAD=10.0.0.11 HOSTS=2 RANK=0 bash train.sh \
#         --config=configs/gpt_124m.py --config.data.shards=DIR    (on each host, with its RANK)
#
# HEAD is the address of host 0 on the training network. torchrun restarts the program on all
# hosts, at most three times, after every status except 0: also after 75 (saved, start again) and
# 78 (the same start would fail again). The hosts need torch, but only for this start:
# jaxtrain/distributed/cluster.py reads the variables, and JAX's coordinator has its own port,
# 62317.
#
# Ran on: torchrun of torch 2.13 with two CPU processes, by hand. Not run: with GPUs.
set -eu
: "${HEAD:?set HEAD: address of host 0}" "${HOSTS:?set HOSTS: their number}" "${RANK:?set RANK}"
exec torchrun --nnodes="$HOSTS" --node-rank="$RANK" --nproc-per-node=1 --max-restarts=3 \
    --master-addr="$HEAD" --master-port=29500 -m jaxtrain.train "$@"
