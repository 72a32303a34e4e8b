#!/usr/bin/env bash
# configs/gpu/first.sh [MINUTES] [--more | --rehearse]      a first run on a machine with one GPU and no network; ends within 9 minutes
#
# The tests for a GPU; kling-bench in its short form; the shipped model trained further on the small world, which is rendered by the CPU's cores
# and encoded on the GPU, for MINUTES (default 3), compiled and in bf16; its scores. Every stage writes its result to OUT (default out/gpu, at most
# 8 files of 15 MB) as soon as it has one, and a line in OUT/stages.jsonl. --more: the remaining parts, in 3 minutes. --rehearse: the same stages
# at a small size on a CPU. FROM: the weights to begin with (default shipped, if their files are there; empty: none, so that the model is trained
# from nothing). WHEELS: the folder of wheels.sh's site.tar.xz (default runs/wheels); WORK: the folder of caches and checkpoints.
set -uo pipefail
cd "$(dirname "$0")/../.."
minutes=3 seconds=530 device=cuda patience=1
for word in "$@"; do
  case $word in
    --more) seconds=170 ;;
    --rehearse) device=cpu seconds=1500 patience=5 ;;
    *[!0-9.]* | "") sed -n 2,9p "$0" >&2 && exit 2 ;;
    *) minutes=$word ;;
  esac
done
end=$(($(date +%s) + seconds))
out=${OUT:-out/gpu} work=${WORK:-runs/gpu-first} wheels=${WHEELS:-runs/wheels}
mkdir -p "$out" "$work/done" "$work/logs" "$work/site/kling_programs"
[ -e "$work/site/diffusers" ] || [ ! -e "$wheels/site.tar.xz" ] || tar -C "$work/site" -xJf "$wheels/site.tar.xz"
for folder in train sample eval configs; do ln -sfn "$PWD/$folder" "$work/site/kling_programs/$folder"; done
export PYTHONPATH="$PWD:$(cd "$work/site" && pwd)${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUTF8=1
python=${PYTHON:-python3}

stage() { # NAME SECONDS COMMAND...: run it within its time and the script's, once
  local name=$1 limit=$(($2 * patience)) left=$((end - $(date +%s))) began code
  shift 2
  [ -e "$work/done/$name" ] && return 0
  ((limit = left < limit ? left : limit))
  ((limit > 5)) || { echo "{\"stage\": \"$name\", \"left\": $left, \"code\": null}" >>"$out/stages.jsonl" && return 1; }
  began=$(date +%s)
  timeout --preserve-status -s TERM -k 10 "$limit" "$@" >>"$work/logs/$name.log" 2>&1
  code=$?
  ((code == 0)) && touch "$work/done/$name"
  echo "{\"stage\": \"$name\", \"seconds\": $(($(date +%s) - began)), \"limit\": $limit, \"code\": $code}" | tee -a "$out/stages.jsonl"
  tar -C "$work" -czf "$out/logs.tar.gz" logs
  return "$code"
}

run=$work/run preset=(configs/dit/world.yaml text_from=kling/assets/text_encoder)
from=${FROM-$([ ! -e kling/assets/transformer ] || echo shipped)}
[ -z "$from" ] || preset=(configs/dit/world-brush.yaml "init_from=$from")
if [ $device = cuda ]; then
  tests=(tests/test_gpu.py) suites=(dit train) workers=$(($(nproc) - 2)) probe=60
  clips=("clips: 3000" "shorter: {17: 4500, 1: 6000}" "paths: {17: 1500, 41: 800}")
  preset+=(compile=true mixed_precision=bf16 batch=64)
  evaluation=(--tasks text-en,plain,words,camera,image-motion,things-2,brush --steps 12 --workers "$(nproc)" --precision fp32)
else
  export KLING_GPU_TESTS=cpu
  tests=(tests/test_gpu.py -k "vae or diffusers") suites=(sampler) workers=0 probe=2 minutes=0.1
  clips=("clips: 6" "shorter: {1: 6}" "paths: {17: 6}")
  preset+=(threads=1 batch=1 "frames=[1,17]" max_frames=17)
  evaluation=(--n 1 --steps 1 --quick)
fi
encode=$work/encode.yaml
[ $device = cuda ] && lengths="[1, 17, 41]" || lengths="[1, 17]"
printf '%s\n' "${clips[@]}" "shard: 100" "workers: $workers" "data: {frames: $lengths}" >"$encode"
train=("$python" -m kling_programs.train.train_dit "${preset[@]}" "out=$run" "cache=$work/cache" "encode=$encode" "workers=$((workers < 4 ? workers : 4))"
  sample_every=0 "samples=[]" save_every=500 log_every=10 keep_last=1)

stage machine 20 "$python" -c "import torch, platform; print(platform.platform(), torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())"
stage tests 100 "$python" -m pytest -q -p no:cacheprovider -m gpu "${tests[@]}"
stage bench 75 "$python" -m kling_programs.eval.bench "${suites[@]}" --device $device --quick --json "$out/bench.json"
stage encode 110 "$python" -m kling_programs.train.encode "$encode" "out=$work/cache"
# A few steps show the speed, and so how many fit: the learning rate reaches its end with the last of them.
stage pace 150 "${train[@]}" "steps=$probe"
if [ ! -e "$work/steps" ] && [ -e "$run/metrics.jsonl" ]; then
  "$python" - "$run/metrics.jsonl" "$minutes" >"$work/steps" <<'PY'
import json, statistics, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
pace = statistics.median(line["time/step"] for line in lines[len(lines) // 2 :])
print(len(lines) + max(1, int(60 * float(sys.argv[2]) / pace)))
PY
fi
steps=$(cat "$work/steps" 2>/dev/null || echo $probe)
limit=$("$python" -c "print(int(60 * $minutes * 1.3) + 45)")
if ! stage train "$limit" "${train[@]}" "steps=$steps" && [ -e "$run/latest" ]; then # out of time: what there is becomes the model
  stage export 40 "${train[@]}" "steps=$((10#$(tr -dc 0-9 <"$run/latest")))"
fi
if [ -d "$run/export" ]; then
  gzip -c "$run/metrics.jsonl" >"$out/metrics.jsonl.gz"
  rm -f "$out"/weights.tar.*
  tar -C "$run/export" -c transformer text_encoder scheduler model_index.json | split -b 14m - "$out/weights.tar."
  left=$(((end - $(date +%s)) / 60))
  stage scores 400 "$python" -m kling_programs.eval.evaluate world --model "$run/export" --out "$work/eval" "${evaluation[@]}" --limit-minutes $((left > 1 ? left - 1 : 1))
  [ -e "$work/eval/scores.json" ] && cp "$work/eval/scores.json" "$out/"
  [ -e "$work/eval/cases.jsonl" ] && tar -C "$work/eval" -czf "$out/eval.tar.gz" run.json cases.jsonl # enough to go on elsewhere
fi
ls -l "$out"
[ -e "$work/done/scores" ]
