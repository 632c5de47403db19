"""Where JAX starts: other processes are joined, and devices are counted once."""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path


def quiet_libtpu() -> None:
    """Keeps JAX from looking for TPUs where libtpu is only there to compile for them."""
    # CUDA's and ROCm's packages of any version lie in the namespace package jax_plugins.
    others = find_spec("jax_plugins")
    if "JAX_PLATFORMS" in os.environ or find_spec("libtpu") is None or others:
        return
    if not any(Path("/dev").glob("accel*")) and not any(Path("/dev/vfio").glob("[0-9]*")):
        os.environ["JAX_PLATFORMS"] = "cpu"


def start(args: argparse.Namespace) -> int:
    """Joins the other processes, if there are any, and counts the devices: JAX starts here.

    ValueError when there are none of the kind that JAX_PLATFORMS asks for.
    """
    _join_cluster(args)
    import jax

    try:
        return jax.device_count()
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"no device to run on, JAX_PLATFORMS={asked!r}: {why}") from error


def _join_cluster(args: argparse.Namespace) -> None:
    if "coordinator" not in args:
        return
    named = (args.coordinator, args.processes, args.process_id)
    if any(v is not None for v in named):
        if any(v is None for v in named):
            raise ValueError("--coordinator, --processes and --process-id belong together")
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--coordinator {args.coordinator!r} must look like HOST:PORT")
        if not 0 <= args.process_id < args.processes:
            raise ValueError(
                f"--process-id {args.process_id} must be in 0..{args.processes - 1} (--processes)"
            )
    elif not args.distributed:
        return
    import jax

    # A dead process is noticed after this many seconds; the others then end.
    jax.distributed.initialize(
        args.coordinator, args.processes, args.process_id, heartbeat_timeout_seconds=30
    )
