#!/usr/bin/env bash
# Several processes on this machine, CPU devices only: the multi-host code path without a cluster.
# usage: PROCESSES=2 DEVICES=4 launch/local.sh CONFIG [FIELD=VALUE ...]
set -euo pipefail
config=${1:?usage: launch/local.sh CONFIG [FIELD=VALUE ...]}; shift
processes=${PROCESSES:-2}
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=${DEVICES:-4}
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
pids=()
for ((i = 0; i < processes; i++)); do
  "${JAXLAB:-jaxlab}" train "$config" --run-dir "${RUN_DIR:-runs/$config}" "$@" \
    --coordinator "127.0.0.1:$port" --processes "$processes" --process-id "$i" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
