"""Entry point of the `jaxlab` command."""

import os
import platform
import sys

# Must be in place before the process starts: large pages for what malloc gives, as XLA's CPU client
# takes its memory anew each step. Without them a fifth of the demo's time goes into page faults.
TUNABLES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


def main() -> int:
    """Runs the command line with the configurations of this folder."""
    if platform.libc_ver()[0] == "glibc" and TUNABLES[0] not in os.environ:
        os.environ.setdefault(*TUNABLES)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    from configs import presets
    from train.cli import main as command

    return command(presets())


if __name__ == "__main__":
    sys.exit(main())
