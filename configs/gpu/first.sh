#!/usr/bin/env bash
# configs/gpu/first.sh [MINUTES] [--try | --more | --rehearse]   a first run on a machine with one GPU and no network; ends within 9 minutes
#
# The tests for a GPU, beside the encoding of the small world's clips, which the GPU renders; the shipped model trained on them for MINUTES
# (default 5), with the brush, references and shots, in bf16 and compiled; then its few-step student, beside its scores. Every stage writes its
# result to OUT (default out/gpu, at most 8 files of 15 MB) as soon as it has one, and a line in OUT/stages.jsonl. --try: every stage for a
# moment and kling-bench in its short form, in 4 minutes, to see what works and how fast. --more: the remaining parts, in 3 minutes.
# --rehearse: the same stages at a small size on a CPU. FROM: the weights to begin with (default shipped, if their files are there; empty:
# none, so that the model is trained from nothing). WHEELS: the folder of wheels.sh's site.tar.xz (default runs/wheels); WORK: the folder of
# caches and checkpoints.
set -uo pipefail
cd "$(dirname "$0")/../.."
minutes=5 seconds=530 device=cuda size=whole patience=1
for word in "$@"; do
  case $word in
    --try) seconds=230 size=small minutes=0.3 ;;
    --more) seconds=170 ;;
    --rehearse) device=cpu size=tiny seconds=1800 patience=5 minutes=0.1 ;;
    *[!0-9.]* | "") sed -n 2,12p "$0" >&2 && exit 2 ;;
    *) minutes=$word ;;
  esac
done
end=$(($(date +%s) + seconds))
out=${OUT:-out/gpu} work=${WORK:-runs/gpu-first} wheels=${WHEELS:-runs/wheels}
mkdir -p "$out" "$work/done" "$work/logs" "$work/site/kling_programs"
[ -e "$work/site/diffusers" ] || [ ! -e "$wheels/site.tar.xz" ] || tar -C "$work/site" -xJf "$wheels/site.tar.xz"
for folder in train sample eval configs; do ln -sfn "$PWD/$folder" "$work/site/kling_programs/$folder"; done
export PYTHONPATH="$PWD:$(cd "$work/site" && pwd)${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUTF8=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
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

run=$work/run preset=(configs/dit/world.yaml text_from=kling/assets/text_encoder) extra=()
from=${FROM-$([ ! -e kling/assets/transformer ] || echo shipped)}
[ -z "$from" ] || preset=(configs/dit/world-controls.yaml "init_from=$from") extra=(brush=0.25 reference=0.25 shots=0.25)
workers=$(($(nproc) - 3)) lengths="[1, 17, 41]" mix="frames=[1$(printf ', %s' 17 17 17 17 17 17 17 41 41 41 41 41 41 41 41 41 41 41 41 41 41 41 41)]"
tests=(tests/test_gpu.py) few=(batch=128 "$mix" lr=3.0e-4)
evaluation=(--tasks text-en,plain,words,camera,image-motion,things-2,brush,shots,reference --steps 12 --workers "$workers" --precision fp32)
case $size in
  whole) clips=("clips: 8000" "shorter: {17: 8000, 1: 6000}" "paths: {17: 2000, 41: 2500}" "shots: {17: 2000, 41: 2500}") probe=60 share=0.3 ;;
  small) clips=("clips: 800" "shorter: {17: 800, 1: 800}" "paths: {17: 300, 41: 300}" "shots: {17: 300, 41: 300}") probe=40 share=0.5 ;;
  tiny) clips=("clips: 6" "shorter: {1: 6}" "paths: {17: 6}" "shots: {17: 6}") probe=2 share=0.3 ;;
esac
if [ $device = cuda ]; then
  preset+=(compile=true mixed_precision=bf16 batch=256 lr=1.5e-3 warmup=100 camera_drop=0.3 "$mix")
else
  export KLING_GPU_TESTS=cpu
  tests+=(-k "vae or diffusers") workers=0 lengths="[1, 17]"
  preset+=(threads=1 batch=1 "frames=[1,17]" max_frames=17) few=(threads=1 batch=1 "frames=[1,17]")
  evaluation=(--n 1 --steps 1 --quick)
fi
encode=$work/encode.yaml
printf '%s\n' "${clips[@]}" "references: 4" "shard: 100" "workers: $workers" "data: {frames: $lengths}" >"$encode"
train=("$python" -m kling_programs.train.train_dit "${preset[@]}" "${extra[@]}" "out=$run" "cache=$work/cache" "encode=$encode" "workers=$workers"
  sample_every=0 "samples=[]" save_every=500 log_every=10 keep_last=1)
distill=("$python" -m kling_programs.train.distill configs/distill/world.yaml "teacher=$run/export" "${extra[@]}" "${few[@]}" "out=$work/fast"
  "cache=$work/cache" encode= "workers=$workers" sample_every=0 "samples=[]" save_every=100 log_every=10)

stage machine 20 "$python" -c "import torch, platform; print(platform.platform(), torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name()); import os, shutil; print(os.cpu_count(), 'processors,', shutil.disk_usage('/dev/shm').total >> 30, 'GiB of shared memory')"
stage tests 120 "$python" -m pytest -q -p no:cacheprovider -m gpu "${tests[@]}" &
stage encode 110 "$python" -m kling_programs.train.encode "$encode" "out=$work/cache"
[ $size = whole ] || wait
# A few steps show the speed, and so how many fit: the learning rate reaches its end with the last of them.
stage pace 150 "${train[@]}" "steps=$probe"
if [ ! -e "$work/steps" ] && [ -e "$run/metrics.jsonl" ]; then
  "$python" - "$run/metrics.jsonl" "$minutes" "$share" >"$work/steps" <<'PY'
import json, statistics, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
pace = statistics.mean(line["time/step"] for line in lines[len(lines) // 2 :])
print(len(lines) + max(1, int(60 * float(sys.argv[2]) / pace)), 1 + int(60 * float(sys.argv[2]) * float(sys.argv[3]) / (2 * pace)))
PY
fi
read -r steps student < <(cat "$work/steps" 2>/dev/null || echo $probe 20) # an update of the student, of half as many clips, takes about twice as long
limit=$("$python" -c "print(int(60 * $minutes * 1.15) + 40)")
if ! stage train "$limit" "${train[@]}" "steps=$steps" && [ -e "$run/latest" ]; then # out of time: what there is becomes the model
  stage export 40 "${train[@]}" "steps=$((10#$(tr -dc 0-9 <"$run/latest")))"
fi
wait
if [ -d "$run/export" ]; then
  gzip -c "$run/metrics.jsonl" >"$out/metrics.jsonl.gz"
  rm -f "$out"/weights.tar.*
  tar -C "$run/export" -c transformer text_encoder scheduler model_index.json | split -b 14m - "$out/weights.tar."
  (
    if ! stage student 160 "${distill[@]}" "steps=$student" && [ -e "$work/fast/latest" ]; then
      stage export-student 40 "${distill[@]}" "steps=$((10#$(tr -dc 0-9 <"$work/fast/latest")))"
    fi
    [ -d "$work/fast/export" ] && tar -C "$work/fast/export" -c transformer_fast model_index.json | split -b 14m - "$out/fast.tar."
  ) &
  left=$(((end - $(date +%s)) / 60))
  stage scores 400 "$python" -m kling_programs.eval.evaluate world --model "$run/export" --out "$work/eval" "${evaluation[@]}" --limit-minutes $((left > 1 ? left - 1 : 1))
  [ -e "$work/eval/cases.jsonl" ] && tar -C "$work/eval" -czf "$out/eval.tar.gz" $(cd "$work/eval" && ls -d run.json cases.jsonl scores.* strips 2>/dev/null)
  wait
fi
[ $size = whole ] || stage bench 75 "$python" -m kling_programs.eval.bench $([ $device = cuda ] && echo dit train || echo sampler) --device $device --quick --json "$work/logs/bench.json"
cp "$run/metrics.jsonl" "$work/logs/" 2>/dev/null
tar -C "$work" -czf "$out/logs.tar.gz" logs
ls -l "$out"
[ -e "$work/done/scores" ]
