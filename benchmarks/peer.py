"""The other side of a comparison: a script in its own interpreter, driven line by line in JSON."""

import json
import subprocess
from pathlib import Path


class Peer:
    """The other side in its own process; it sleeps between commands."""

    def __init__(self, python: str, script: Path):
        self.process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **arguments):
        """Sends a command and waits for its answer; RuntimeError if the peer died."""
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()
