"""Entry point of the `jaxlab` command."""

import sys

from configs import presets
from train.cli import main as command


def main() -> int:
    """Runs the command line with the configurations of this folder."""
    return command(presets())


if __name__ == "__main__":
    sys.exit(main())
