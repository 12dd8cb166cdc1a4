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
sample='{"dataset": "sample", "pretrained": false, "encoder": "resnet18", "image_size": 32, "num_epochs": 2}'
if [[ $data == --rehearse ]]; then
    mkdir -p "$out" && python build_dataset.py --sample --data_dir "$out" || exit
    device=cpu slack=4 marks="gpu and slow" nothing=5 repeats=1 seeds="1 2" data=$out/sample recipe=$sample
    steps=(--encoders resnet18 --sizes 32) compiled=("${steps[@]}") deep=("${steps[@]}")
    photos=(--image_size 32 --batch_size 2)
else
    python - "$data" <<'EOF' || exit 2
import sys, torch
from model import UserError
from model.layouts import find_split
try:
    for split in ("trainaug", "val"):
        find_split("voc", sys.argv[1], split, masks_required=True)
    if not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU here; --rehearse goes without one")
except UserError as error:
    sys.exit(f"gpu.sh: error: {error}")
EOF
    mkdir -p "$out" || exit
    device=cuda slack=1 marks=gpu nothing=0 repeats=5 seeds="1 2 3"
    recipe=$(sed 's/\("image_size": \)[0-9]*/\1224/; s/\("num_epochs": \)[0-9]*/\120/; s/\("batch_size": \)[0-9]*/\132/' \
        experiments/best/params.json)
    steps=(--encoders resnet50 --sizes 224 512 --batch_sizes 32 5 128 --precisions bf16 fp32 fp16 --checkpointing off)
    compiled=(--encoders resnet50 --sizes 224 512 --batch_sizes 32 --precisions bf16 --compile on --checkpointing off)
    deep=(--encoders resnet18 resnet50 resnet152 --sizes 224 512 --batch_sizes 16)
    photos=(--batch_size 32)
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

tests() { # pytest ends with 5 where no test is selected, as in a rehearsal
    python -m pytest -n 0 -m "$marks" || [[ $? -eq $nothing ]]
}

set_key='import json, sys; print(json.dumps(json.load(sys.stdin) | {sys.argv[1]: int(sys.argv[2])}))'
write_params() { # folder, params, key, value
    mkdir -p "$1" && python -c "$set_key" "$3" "$4" <<<"$2" >"$1/params.json"
}

across() { # a run that goes from the device to the CPU and back, two epochs on each
    local epochs=0 where
    rm -rf "$out/across"
    for where in "$device" cpu "$device"; do
        write_params "$out/across" "$sample" num_epochs $((epochs += 2)) &&
            python train.py --model_dir "$out/across" --data_dir "$out/drawn" --device "$where" --resume || return
    done
    grep -q "trained 6 of 6 epochs" "$out/across/train.log"
}

train() { # the recipe with several seeds
    local seed run
    for seed in $seeds; do
        run=$out/runs/best224__seed_$seed
        write_params "$run" "$recipe" seed "$seed" || return
        python train.py --model_dir "$run" --data_dir "$data" --device "$device" --resume || return
    done
}

score() { # each of them at the photos' own size, also one for which the time ran out
    local split file status=0
    for split in val val2; do
        if [[ $split == val2 && -z $(find "$data" -name val2.txt) ]]; then continue; fi
        for file in "$out"/runs/*/best.pth.tar; do
            python evaluate.py --model_dir "$(dirname "$file")" --data_dir "$data" --device "$device" --original_size \
                --split "$split" || status=1
        done
    done
    return $status
}

export -f tests across train score write_params
export out data device seeds recipe sample set_key marks nothing TQDM_DISABLE=1 # progress bars are no part of a table
measure=(--device "$device" --repeats "$repeats")
part tests 200 bash -c 'trap : TERM; tests'
part across 100 bash -c 'trap : TERM; across'
part steps 180 python benchmarks/steps.py "${measure[@]}" "${steps[@]}"
part run 220 python benchmarks/run.py "${measure[@]}" --data_dir "$data"
part compiled 120 python benchmarks/steps.py "${measure[@]}" "${compiled[@]}"
part prediction 80 python benchmarks/prediction.py "${measure[@]}" --data_dir "$data" "${photos[@]}"
part encoders 100 python benchmarks/steps.py "${measure[@]}" "${deep[@]}"
part train $((1020 - SECONDS + begun > 60 ? 1020 - SECONDS + begun : 60)) bash -c 'trap : TERM; train'
part score 90 bash -c 'trap : TERM; score'
part results 30 python synthesize_results.py --parent_dir "$out/runs" --over_seeds

echo "tables: $out/tables.md"
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed or out of time: ${failed[*]}; see $out/<part>.txt" >&2
    exit 1
fi
