#!/usr/bin/env bash
# Runs one configuration on every host of a TPU slice made with gcloud.
# usage: launch/tpu_pod.sh TPU_NAME ZONE CONFIG [FIELD=VALUE ...]
# RUN_DIR must be on a file system that every host has mounted (Filestore, or a bucket by gcsfuse).
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,4p' "$0"; exit 2; }
name=$1 zone=$2 config=$3; shift 3
run_dir=${RUN_DIR:?set RUN_DIR to a folder on a file system that every host has mounted}
repository=${REPOSITORY:-$(git remote get-url origin)}
command=$(printf '%q ' .venv/bin/jaxlab train "$config" --distributed --run-dir "$run_dir" "$@")
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "
  set -e
  [ -d jaxlab-src ] || git clone --quiet $(printf '%q' "$repository") jaxlab-src
  cd jaxlab-src && git pull --quiet
  [ -d .venv ] || { python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu,data,hf]'; }
  $command"
