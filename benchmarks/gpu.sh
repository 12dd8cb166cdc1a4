#!/usr/bin/env bash
# All that is to be measured on a GPU, most important first, in under 20 minutes:
#   benchmarks/gpu.sh OUT DATA_DIR     writes OUT/<part>.txt, and OUT/tables.md for the RESULTS pages
#   benchmarks/gpu.sh OUT --rehearse   the same in small on the CPU, on drawn scenes
# DATA_DIR is VOC2012 with trainaug.txt and val.txt, and val2.txt if there is one. A part that fails or runs out of time
# is reported at the end; the others still run.
set -u
if [[ $# -ne 2 || $1 == -* || ($2 == -* && $2 != --rehearse) ]]; then sed -n 's/^#   //p' "$0" >&2; exit 2; fi
out=$(realpath -m "$1") data=$2 failed=() begun=$SECONDS
if [[ $data != --rehearse ]]; then data=$(realpath -m "$data"); fi
cd "$(dirname "$0")/.."
if [[ $data != --rehearse ]]; then
    python - "$data" <<'EOF' || exit 2
import sys
from pathlib import Path
import torch
from model import UserError
from model.layouts import find_split
try:
    for split in ("trainaug", "val"):
        find_split("voc", Path(sys.argv[1]), split, masks_required=True)
    if not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU here; --rehearse goes without one")
except UserError as error:
    sys.exit(f"gpu.sh: error: {error}")
EOF
fi
mkdir -p "$out"

if [[ $data == --rehearse ]]; then
    device=cpu slack=4 tests="gpu and slow" repeats=1 seeds="1 2" data=$out/data
    recipe='{"dataset": "sample", "pretrained": false, "encoder": "resnet18", "image_size": 32, "num_epochs": 2}'
    steps=(--encoders resnet18 --sizes 32 --precisions fp32 bf16 --checkpointing off)
    compiled=(--encoders resnet18 --sizes 32 --precisions fp32 --compile off --checkpointing off)
    deep=(--encoders resnet18 --sizes 32)
    photos=(--image_size 32 --photos 4 --repeats 1)
else
    device=cuda slack=1 tests=gpu repeats=5 seeds="1 2 3"
    recipe=$(python - <<'EOF'
import json
base = json.load(open("experiments/best/params.json"))
print(json.dumps(base | {"image_size": 224, "train_split": "trainaug", "batch_size": 32, "num_epochs": 20}))
EOF
    )
    steps=(--encoders resnet50 --sizes 224 512 --batch_sizes 32 5 128 --precisions bf16 fp32 fp16 --checkpointing off
        --steps 10)
    compiled=(--encoders resnet50 --sizes 224 512 --batch_sizes 32 --precisions bf16 --compile on --checkpointing off
        --steps 10)
    deep=(--encoders resnet18 resnet50 resnet152 --sizes 224 512 --batch_sizes 16 --steps 5)
    photos=(--data_dir "$data" --batch_size 32)
fi

part() { # name, seconds at most, command
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    timeout --kill-after 10 $((slack * limit)) "$@" >"$out/$name.txt" 2>&1 &
    child=$!
    wait "$child" || status=$?
    echo "$name: exit status $status after $((SECONDS - start)) s"
    if [[ $status -ne 0 ]]; then failed+=("$name"); fi
    for name in steps compiled encoders run prediction results; do
        if [[ -f $out/$name.txt ]]; then printf '\n## %s\n\n' "$name" && cat "$out/$name.txt"; fi
    done >"$out/tables.md"
}
trap 'kill "${child:-$$}"; exit 130' INT TERM

# A run that goes from the device to the CPU and back, two epochs on each.
across() {
    local run=$out/across epochs=0 where
    rm -rf "$run"
    mkdir -p "$run"
    for where in "$device" cpu "$device"; do
        epochs=$((epochs + 2))
        python - "$run" "$epochs" <<'EOF' || return
import json, sys
options = {"dataset": "sample", "pretrained": False, "encoder": "resnet18", "image_size": 64, "num_workers": 0}
json.dump(options | {"num_epochs": int(sys.argv[2]), "precision": "fp32"}, open(f"{sys.argv[1]}/params.json", "w"))
EOF
        python train.py --model_dir "$run" --data_dir "$out/sample" --device "$where" --resume || return
    done
    grep -q "trained 6 of 6 epochs" "$run/train.log"
}

# The recipe with several seeds.
train() {
    local seed run
    for seed in $seeds; do
        run=$out/runs/best224__seed_$seed
        mkdir -p "$run"
        python -c "import json, sys; print(json.dumps(json.loads(sys.argv[1]) | {'seed': $seed}))" "$recipe" >"$run/params.json"
        python train.py --model_dir "$run" --data_dir "$data" --device "$device" --resume || return
    done
}

# Each of them at the photos' own size, also one for which the time ran out.
score() {
    local split file status=0
    for split in val val2; do
        if [[ $split == val2 ]] && ! python -c "$has_val2" "$data"; then continue; fi
        for file in "$out"/runs/*/best.pth.tar; do
            python evaluate.py --model_dir "$(dirname "$file")" --data_dir "$data" --device "$device" --original_size \
                --split "$split" || status=1
        done
    done
    return $status
}

export -f across train score
has_val2='import sys; from model.layouts import VOCFolders as F; sys.exit(not (F.find(sys.argv[1]).lists / "val2.txt").exists())'
export out data device seeds recipe has_val2 TQDM_DISABLE=1 # progress bars are no part of a table
code=$([[ $tests == gpu ]] && echo 0 || echo 5) # 5: no test was selected, as is right in a rehearsal
part tests 200 bash -c "trap : TERM; python -m pytest -n 0 -m '$tests'; [[ \$? -eq $code ]]"
part across 100 bash -c 'trap : TERM; across'
part steps 180 python benchmarks/steps.py --device "$device" "${steps[@]}"
part run 220 python benchmarks/run.py --device "$device" --repeats "$repeats"
part compiled 120 python benchmarks/steps.py --device "$device" "${compiled[@]}"
part prediction 80 python benchmarks/prediction.py --device "$device" "${photos[@]}"
part encoders 100 python benchmarks/steps.py --device "$device" "${deep[@]}"
part train $((1020 - SECONDS + begun > 60 ? 1020 - SECONDS + begun : 60)) bash -c 'trap : TERM; train'
part score 90 bash -c 'trap : TERM; score'
part results 30 python synthesize_results.py --parent_dir "$out/runs" --over_seeds

echo "tables: $out/tables.md"
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed or out of time: ${failed[*]}; see $out/<part>.txt" >&2
    exit 1
fi
