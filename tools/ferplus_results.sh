#!/usr/bin/env bash
# All systems and two peers from scratch on FERPlus, with one recipe and budget, then the table in docs/results.md:
#
#   tools/ferplus_results.sh DATA OUT [EPOCHS] [SEED ...]
#
# Run again, it goes on where it was stopped. OUT keeps the runs.
set -euo pipefail
data=$(realpath "${1:?folder or zip file of FERPlus}") out=$(realpath -m "${2:?folder for the runs}") epochs=${3:-12}
cd "$(dirname "$0")/.."
seeds=("${@:4}")
[ ${#seeds[@]} -gt 0 ] || seeds=(0)

train() { # name, then options of fer train
  python -m fer_models.cli train ferplus_face2nodes_xs --root "$data" --epochs "$epochs" --out "$out/$1" --seeds "${seeds[@]}" \
    --resume auto "${@:2}"
}

train face2nodes_xs
train jadfer_xs --model jadfer_xs --size 48 --lr 1e-3
train lnlattennet_xs --model lnlattennet_xs --size 48 --lr 1e-3
train emotion_gcn_resnet18 --model emotion_gcn_resnet18 --size 48 --lr 1e-3
train vig --model vig_ti --model-options "dims=[128]" "depths=[12]" num_features=512 stride=8 --size 48 --lr 1e-3
# Of equal size; in float32, which convolutions on small maps are faster in on a CPU
train resnet18 --model timm/resnet18 --model-options "channels=[32, 64, 128, 256]" --size 48 --lr 1e-3 --no-amp
python tools/results.py "$out" > "$out/results.md"
mv "$out/results.md" docs/results.md
