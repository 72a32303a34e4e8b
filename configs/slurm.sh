#!/usr/bin/env bash
# sbatch --nodes 4 configs/slurm.sh fsdp2 configs/dit/14b.yaml out=runs/14b vae=VAE cache=CACHE
# One task per node; `accelerate launch` starts a process for each of its GPUs. Before the time limit SLURM sends SIGUSR1: the run saves, exits with
# 143, and is queued again; the same command continues where it stopped. Set account and partition on sbatch's command line.
#SBATCH --job-name=kling
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

layout=${1:?usage: sbatch configs/slurm.sh LAYOUT PRESET [key=value ...]}
shift
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:-8}
processes=$((SLURM_NNODES * gpus))
case $layout in # sizes of the layout, whose product is the number of processes
    fsdp2) sizes="--parallelism_config_dp_shard_size $processes" ;;
    hsdp) sizes="--parallelism_config_dp_replicate_size $SLURM_NNODES --parallelism_config_dp_shard_size $gpus" ;;
    fsdp2_cp) sizes="--parallelism_config_cp_size ${CP_SIZE:-2} --parallelism_config_dp_shard_size $((processes / ${CP_SIZE:-2}))" ;;
    *) sizes="" ;;
esac

# SIGUSR1 is for the training processes: `accelerate`, their parent, ignores it, and the shell passes it on.
launch='trap "" USR1
accelerate launch "$@" --machine_rank "$SLURM_NODEID" '"train/train_dit.py $(printf '%q ' "$@")"' &
child=$!
trap "pkill -USR1 -P $child" USR1
while wait $child; [ $? -gt 128 ] && kill -0 $child 2>/dev/null; do :; done # a signal ends a wait
wait $child # its own exit code, also if it ended while a signal was handled
exit $?'
# shellcheck disable=SC2086 - $sizes is several words
srun --kill-on-bad-exit=1 bash -c "$launch" kling --config_file "configs/accelerate/$layout.yaml" --num_machines "$SLURM_NNODES" \
    --num_processes "$processes" --main_process_ip "$host" --main_process_port "${MASTER_PORT:-29500}" $sizes
code=$?
# a stopped run exits with 143, but its launcher with 1: a checkpoint of the last minutes distinguishes it from a failed run
out=$(printf '%s\n' "$@" | sed -n 's/^out=//p' | tail -n 1)
if [ $code -ne 0 ] && [ -n "$(find "${out:-runs/dit}/latest" -mmin -10 2>/dev/null)" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
