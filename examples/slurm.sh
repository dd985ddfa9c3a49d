#!/usr/bin/env bash
# Train on whole nodes, go on after pre-emption and after a time limit. Arguments are those of `vrpo train`:
#   sbatch examples/slurm.sh --preset cifar10-sit-s-2-vrpo --data data/train --out runs/vrpo
#SBATCH --job-name=vrpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8

# One launcher a node; each starts a process for every GPU. The signal reaches this script, which passes it on.
# torchrun ends what has not stopped 30 seconds after that.
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:${MASTER_PORT:-29500}" \
  -m vrpo train "$@" --resume &
launcher=$!
stopped=
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
wait "$launcher"
code=$?
if [ -n "$stopped" ]; then
  wait "$launcher" # until the checkpoint is written
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
