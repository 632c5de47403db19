#!/usr/bin/env bash
# Runs one configuration on every host of a TPU slice made with gcloud.
# usage: launch/tpu_pod.sh TPU_NAME ZONE CONFIG [FIELD=VALUE ...]
# RUN_DIR must be on a file system that every host has mounted (Filestore, or a bucket by gcsfuse).
# PYTHON names the hosts' interpreter, 3.11 or newer, where python3 is older.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,5p' "$0"; exit 2; }
name=$1 zone=$2 config=$3; shift 3
run_dir=${RUN_DIR:?set RUN_DIR to a folder on a file system that every host has mounted}
repository=${REPOSITORY:-$(git remote get-url origin)}
python=$(printf '%q' "${PYTHON:-python3}")
command=$(printf '%q ' .venv/tpu/bin/jaxlab train "$config" --distributed --run-dir "$run_dir" "$@")
# The marker is made last: what failed half-way is installed again, and so is what has changed since.
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "
  set -e
  [ -d jaxlab-src ] || git clone --quiet $(printf '%q' "$repository") jaxlab-src
  cd jaxlab-src && git pull --quiet
  if ! [ .venv/tpu/ready -nt pyproject.toml ]; then
    $python -m venv .venv/tpu
    .venv/tpu/bin/pip install --quiet -e '.[tpu,data,gcs,hf]'
    touch .venv/tpu/ready
  fi
  $command"
