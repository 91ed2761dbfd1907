#!/usr/bin/env bash
# Train on two hosts of four GPUs each. Run this on both, with the same arguments but for the host's number:
#
#   HOST=0 MAIN=10.0.0.1 examples/two_hosts.sh ferplus_face2nodes_xs --root DATA --out /shared/runs/one
#   HOST=1 MAIN=10.0.0.1 examples/two_hosts.sh ferplus_face2nodes_xs --root DATA --out /shared/runs/one
#
# MAIN is host 0's address. --out is a folder that both see; --batch-size is that of all GPUs together. The
# same with --resume auto goes on after any of them was stopped. GPUS=0 runs one process a host on the CPU.
set -euo pipefail
exec torchrun \
  --nnodes "${HOSTS:-2}" --node-rank "${HOST:?the number of this host, from 0}" \
  --nproc-per-node "$((${GPUS:-4} > 0 ? ${GPUS:-4} : 1))" \
  --master-addr "${MAIN:?the address of host 0}" --master-port "${PORT:-29500}" \
  -m fer_models.cli train "$@"
