#!/usr/bin/env bash
# One process a node, all GPUs of the node. JAX finds the peers from SLURM's variables.
# usage: sbatch --nodes=4 launch/slurm.sh CONFIG [FIELD=VALUE ...]
# The command is the one of `make` here, after .venv/3.12/bin/pip install -e '.[cuda,data,hf]', or JAXLAB.
#SBATCH --job-name=jaxlab
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
# SIGTERM reaches every process two minutes before the limit: they save one step and exit with 75.
#SBATCH --signal=TERM@120
set -uo pipefail
config=${1:?usage: sbatch --nodes=4 launch/slurm.sh CONFIG [FIELD=VALUE ...]}; shift
jaxlab=${JAXLAB:-$(ls .venv/3.*/bin/jaxlab 2>/dev/null | tail -n 1)}
[ -n "$jaxlab" ] || { echo "no .venv/3.*/bin/jaxlab in $PWD: make one, or set JAXLAB" >&2; exit 2; }
srun --kill-on-bad-exit=0 "$jaxlab" train "$config" --distributed \
  --run-dir "${RUN_DIR:-runs/$config}" "$@"
code=$?
[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
