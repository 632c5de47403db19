#!/usr/bin/env bash
# One process a node, all GPUs of the node. JAX finds the peers from SLURM's variables.
# usage: sbatch --nodes=4 launch/slurm.sh CONFIG [FIELD=VALUE ...]
#SBATCH --job-name=jaxlab
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
# SIGTERM reaches every process two minutes before the limit: they save one step and exit with 75.
#SBATCH --signal=TERM@120
set -uo pipefail
config=${1:?usage: sbatch launch/slurm.sh CONFIG [FIELD=VALUE ...]}; shift
srun --kill-on-bad-exit=0 .venv/bin/jaxlab train "$config" --distributed \
  --run-dir "${RUN_DIR:-runs/$config}" "$@"
code=$?
[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
