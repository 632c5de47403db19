"""The peers' end of benchmarks/peer.py: a command a line, an answer a line, both JSON."""

import json
import sys
from collections.abc import Callable, Mapping


def serve(commands: Mapping[str, Callable]) -> None:
    """Answers `{"do": name, **arguments}` with `commands[name](**arguments)` until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = commands[command.pop("do")](**command)
        except Exception as error:  # what compilers raise has no common type
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        print(json.dumps(answer), file=answers, flush=True)
