#!/usr/bin/env bash
# configs/gpu/first.sh [MINUTES] [--try | --more | --rehearse]   a first run on a machine with one GPU and no network, in 4 minutes more
#
# The tests for a GPU, beside the encoding of the small world's clips, which the GPU renders; the shipped model trained on them, with the
# brush, references and shots, in bf16 and compiled, for MINUTES (default 5), or less if that is all that is left; then its few-step student,
# beside its scores. Every stage writes its result to OUT (default out/gpu, at most 8 files of 15 MB) as soon as it has one, and a line in
# OUT/stages.jsonl. --try: every stage for a moment and kling-bench in its short form, in 4 minutes, to see what works and how fast. --more:
# the remaining parts and kling-bench, in 3 minutes. --rehearse: the same at a small size on a CPU. FROM: the weights to begin with (default
# shipped, if their files are there; empty: none, so that the model is trained from nothing). WHEELS: the folder of wheels.sh's site.tar.xz
# (default runs/wheels); WORK: the folder of caches and checkpoints (default runs/gpu-whole; runs/gpu-small of --try).
set -uo pipefail
cd "$(dirname "$0")/../.."
minutes=5 seconds="" device=cuda size=whole bench="" patience=1 python=${PYTHON:-python3}
for word in "$@"; do
  case $word in
    --try) seconds=220 size=small bench=yes minutes=0 ;;
    --more) seconds=155 bench=yes ;;
    --rehearse) device=cpu size=tiny bench=yes seconds=1800 patience=5 minutes=0.1 ;;
    *[!0-9.]* | "") sed -n 2,10p "$0" >&2 && exit 2 ;;
    *) minutes=$word ;;
  esac
done
[ -n "$seconds" ] || seconds=$("$python" -c "print(220 + int(60 * $minutes))") || exit 2
end=$(($(date +%s) + seconds)) # a stage that is stopped then has 20 s more to save
out=${OUT:-out/gpu} work=${WORK:-runs/gpu-$size} wheels=${WHEELS:-runs/wheels}
mkdir -p "$out" "$work/done" "$work/logs" "$work/site/kling_programs"
if [ ! -e "$work/site/diffusers" ] && [ -e "$wheels/site.tar.xz" ]; then
  tar -C "$work/site" -xJf "$wheels/site.tar.xz" || "$python" -m tarfile -e "$wheels/site.tar.xz" "$work/site" # where there is no xz
fi
for folder in train sample eval configs; do ln -sfn "$PWD/$folder" "$work/site/kling_programs/$folder"; done
export PYTHONPATH="$PWD:$(cd "$work/site" && pwd)${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUTF8=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONFAULTHANDLER=1
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1 # torch would prefer cuDNN's attention on Hopper, which plans for a second at every new shape of a batch
if [ $device = cuda ]; then             # workers hand over every tensor as a file in shared memory
  [ "$(df --output=avail /dev/shm | tail -n 1)" -gt 16000000 ] || mount -o remount,size=32g /dev/shm
  ulimit -n 65536
fi 2>/dev/null

logs() { # NAME: the logs, whole at any moment, although stages beside each other end
  tar -C "$work" -czf "$work/$1.tar.gz" logs
  mv "$work/$1.tar.gz" "$out/logs.tar.gz"
}

spare=0
stage() { # NAME SECONDS COMMAND...: run it once, within its time and the script's, of which later stages need `spare` seconds
  local name=$1 limit=$(($2 * patience)) left=$((end - spare - $(date +%s))) began code
  shift 2
  [ -e "$work/done/$name" ] && return 0
  ((limit = left < limit ? left : limit))
  ((limit > 5)) || { echo "{\"stage\": \"$name\", \"left\": $left, \"code\": null}" >>"$out/stages.jsonl" && return 1; }
  began=$(date +%s)
  # --foreground: the signal is for the program, which ends its workers; those of a compiler would die before it, and its step with them
  timeout --foreground --preserve-status -k 20 "$limit" "$@" >>"$work/logs/$name.log" 2>&1
  code=$?
  ((code == 0)) && touch "$work/done/$name"
  echo "{\"stage\": \"$name\", \"seconds\": $(($(date +%s) - began)), \"limit\": $limit, \"code\": $code}" | tee -a "$out/stages.jsonl"
  logs "$name"
  return "$code"
}

run=$work/run preset=(configs/dit/world.yaml text_from=kling/assets/text_encoder) extra=()
from=${FROM-$([ ! -e kling/assets/transformer ] || echo shipped)}
[ -z "$from" ] || preset=(configs/dit/world-controls.yaml "init_from=$from") extra=(brush=0.25 reference=0.25 shots=0.25)
workers=$(($(env -u OMP_NUM_THREADS nproc) - 3)) # OMP_NUM_THREADS would be its answer
((workers > 0)) || workers=1
half=$(((workers + 1) / 2)) # for each of two stages beside each other
lengths="[1, 17, 41]" mix="frames=[1$(printf ', %s' 17 17 17 17 17 17 17 41 41 41 41 41 41 41 41 41 41 41 41 41 41 41 41)]"
tests=(tests/test_gpu.py) few=(batch=128 "$mix" lr=3.0e-4)
evaluation=(--tasks text-en,plain,words,camera,image-motion,things-2,brush,shots,reference --steps 12 --workers "$half" --precision fp32)
case $size in
  whole) clips=("clips: 8000" "shorter: {17: 8000, 1: 6000}" "paths: {17: 2000, 41: 2500}" "shots: {17: 2000, 41: 2500}") probe=60 ;;
  small) clips=("clips: 800" "shorter: {17: 800, 1: 800}" "paths: {17: 300, 41: 300}" "shots: {17: 300, 41: 300}") probe=40 ;;
  tiny) clips=("clips: 6" "shorter: {1: 6}" "paths: {17: 6}" "shots: {17: 6}") probe=2 ;;
esac
if [ $device = cuda ]; then
  compile=$(cat "$work/compile" 2>/dev/null || echo true)
  preset+=("compile=$compile" mixed_precision=bf16 batch=256 lr=1.5e-3 warmup=100 camera_drop=0.3 "$mix")
else
  export KLING_GPU_TESTS=cpu
  tests+=(-k "vae or diffusers") workers=0 half=0 lengths="[1, 17]"
  preset+=(threads=1 batch=1 "frames=[1,17]" max_frames=17) few=(threads=1 batch=1 "frames=[1,17]")
  evaluation=(--n 1 --steps 1 --quick)
fi
encode=$work/encode.yaml
printf '%s\n' "${clips[@]}" "references: 4" "shard: 100" "workers: $workers" "data: {frames: $lengths}" >"$encode"
train=("$python" -m kling_programs.train.train_dit "${preset[@]}" "${extra[@]}" "out=$run" "cache=$work/cache" "encode=$encode" "workers=$workers"
  sample_every=0 "samples=[]" save_every=200 log_every=10 keep_last=1)
distill=("$python" -m kling_programs.train.distill configs/distill/world.yaml "teacher=$run/export" brush=0 shots=0 "${extra[@]}" "${few[@]}" "out=$work/fast"
  "cache=$work/cache" encode= "workers=$half" sample_every=0 "samples=[]" save_every=100 log_every=10)
reached() { echo $((10#$(tr -dc 0-9 <"$1/latest"))); } # RUN: the steps of its newest checkpoint

stage machine 60 "$python" -c "import torch, platform; print(platform.platform(), torch.__version__, torch.backends.cudnn.version(), torch.cuda.is_available() and torch.cuda.get_device_name()); import os, shutil; print(os.cpu_count(), 'processors,', shutil.disk_usage('/dev/shm').total >> 30, 'GiB of shared memory')"
# pytest ends by itself, with a report: stopped by a signal it would leave none
stage tests 175 "$python" -m pytest -v --tb=short --timeout=$((70 * patience)) --session-timeout=$((100 * patience)) -p no:cacheprovider -m gpu "${tests[@]}" &
stage encode 110 "$python" -m kling_programs.train.encode "$encode" "out=$work/cache"
# A few steps show the pace, and so how many fit into what is left: the learning rate reaches its end with the last of them.
spare=60 stage pace 180 "${train[@]}" "steps=$probe"
if [ -e "$run/config.yaml" ] && [ ! -e "$run/latest" ]; then # it began, and did not get to a checkpoint
  rm -rf "$run"
  echo false >"$work/compile"
  train=("${train[@]/compile=true/compile=false}")
  spare=60 stage plain 90 "${train[@]}" "steps=$probe"
fi
if [[ ! -s $work/steps && (-e $work/done/pace || -e $work/done/plain) ]]; then # the first steps of one cut short mostly compiled
  # 120 s: the start and export of the training, then the student and the scores
  "$python" - "$run/metrics.jsonl" "$minutes" $((end - 120 - $(date +%s))) >"$work/steps" <<'PY'
import json, sys
minutes, left = map(float, sys.argv[2:])
lines = [json.loads(line) for line in open(sys.argv[1])]
times = sorted(line["time/step"] for line in lines[len(lines) // 2 :])
usual = times[: max(1, len(times) * 9 // 10)]  # without those that compiled for a new shape
pace = sum(usual) / len(usual)
print(len(lines) + 1 + int(max(10, min(60 * minutes, left)) / pace), pace)
PY
fi
read -r steps pace < <(cat "$work/steps" 2>/dev/null) || steps=1500 pace=0.2
if [ "$minutes" != 0 ]; then # --try: the few steps are the training
  [ -e "$work/done/train" ] || rm -rf "$run/export" "$work/done/export"
  spare=60 stage train "$("$python" -c "print(int(60 * $minutes * 1.15) + 40)")" "${train[@]}" "steps=$steps"
fi
if [ ! -d "$run/export" ] && [ -e "$run/latest" ]; then # out of time: what there is becomes the model
  stage export 40 "${train[@]}" "steps=$(reached "$run")"
fi
if [ -d "$run/export" ]; then
  gzip -c "$run/metrics.jsonl" >"$out/metrics.jsonl.gz"
  rm -f "$out"/weights.tar.* "$out"/fast.tar.*
  tar -C "$run/export" -c transformer text_encoder scheduler model_index.json | split -b 14m - "$out/weights.tar."
  # an update of the student, of half as many clips, takes about twice as long; 60 s: its start, and its export if it is slower
  student=$("$python" -c "print(1 + int(max(0, min($end - 60 - $(date +%s), 20 + 18 * $minutes)) / (2 * $pace)))")
  (
    spare=35 stage student 160 "${distill[@]}" "steps=$student"
    if [ ! -d "$work/fast/export" ] && [ -e "$work/fast/latest" ]; then
      stage export-student 40 "${distill[@]}" "steps=$(reached "$work/fast")"
    fi
    [ -d "$work/fast/export" ] && tar -C "$work/fast/export" -c transformer_fast model_index.json | split -b 14m - "$out/fast.tar."
  ) &
  # 40 s: after its limit every worker finishes a case, and the first has controls. --try leaves the rest to kling-bench.
  limit=$("$python" -c "print(max(0.1, min(0.4 if '$size' == 'small' else 60, ($end - 40 - $(date +%s)) / 60)))")
  stage scores 400 "$python" -m kling_programs.eval.evaluate world --model "$run/export" --out "$work/eval" "${evaluation[@]}" --limit-minutes "$limit"
  [ -e "$work/eval/cases.jsonl" ] && tar -C "$work/eval" -czf "$out/eval.tar.gz" $(cd "$work/eval" && ls -d run.json cases.jsonl scores.* strips 2>/dev/null)
fi
wait
[ -z "$bench" ] || stage bench 75 "$python" -m kling_programs.eval.bench $([ $device = cuda ] && echo dit train || echo sampler) --device $device --quick --json "$work/logs/bench.json"
cp "$run/metrics.jsonl" "$work/logs/" 2>/dev/null
logs end
ls -l "$out"
[ -e "$work/done/scores" ]
