"""Times one contender in its own process: a request a line in, an answer a line out, as JSON.

``python worker.py MODULE`` imports ``contenders.MODULE``, whose ``CASES`` maps a case to a function
that sets it up and returns what is to be timed; that must not return before the work is done.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable

#: A turn goes on for so long: after another process had the machine, a first call is slow.
SECONDS_OF_A_TURN = 0.25


def _timed(call: Callable[[], None]) -> list[float]:
    """Seconds of each call of one turn."""
    taken: list[float] = []
    while sum(taken) < SECONDS_OF_A_TURN:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def main() -> None:
    """Answer until the input ends."""
    # What libraries print must not mix with the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    module = importlib.import_module(f"contenders.{sys.argv[1]}")
    print(json.dumps({"cases": sorted(module.CASES)}), file=answers, flush=True)
    ready: dict[str, Callable[[], None]] = {}
    for line in sys.stdin:
        case = json.loads(line)["case"]
        if case not in ready:
            ready[case] = module.CASES[case]()
            ready[case]()
        answer = {"seconds": _timed(ready[case])}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
