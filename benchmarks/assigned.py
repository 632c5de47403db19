"""What a program needs, as soon as the TPU compiler has assigned its memory.

Assigning memory takes it seconds, generating code the minutes after. The figures are those of the
finished program; that code can be generated is not shown. A compilation cannot be stopped, so each
one has a process, which ends when they are there.
"""

import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from sharding.plan import out_of_memory
from sharding.usage import dump_options, read_usage


def in_a_process(script: str, *arguments: str) -> dict[str, Any]:
    """The last line of what `script` prints, which is JSON."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_and_end(compile: Callable[[dict], Any], usable: float) -> None:
    """Calls `compile(compiler options)`, prints what it needs of `usable` bytes and ends the process."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    stamp = versions | {"date": str(datetime.date.today())}

    def end(row: dict[str, Any]) -> None:
        print(json.dumps(row | {"hbm_bytes": usable} | stamp), flush=True)
        os._exit(0)

    with tempfile.TemporaryDirectory() as folder:

        def watch() -> None:
            before = None
            while True:
                time.sleep(0.5)
                used = read_usage(folder)
                if used and used == before:  # and not half written
                    row = {"fits": used.hbm_bytes <= usable, "needs_bytes": used.hbm_bytes}
                    row |= {"temp_bytes": used.heap_bytes, "host_bytes": used.host_bytes}
                    end(row | {"largest": used.largest})
                before = used

        threading.Thread(target=watch, daemon=True).start()
        try:
            compile(dump_options(folder))
        except Exception as error:  # of the compiler, which has many kinds
            needs, _ = out_of_memory(str(error))
            if not needs:
                raise
            end(
                {
                    "fits": False,
                    "needs_bytes": needs,
                    "temp_bytes": None,
                    "host_bytes": None,
                    "largest": [],
                }
            )
        time.sleep(5)  # the report of a program this small may be read late
