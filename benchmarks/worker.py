"""Times one contender in its own process: a request a line in, an answer a line out, as JSON.

``python worker.py MODULE`` imports ``contenders.MODULE``, whose ``CASES`` maps a case to a function
that sets it up and returns what is to be timed; that must not return before the work is done.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable


def main() -> None:
    """Answer until the input ends."""
    # What libraries print must not mix with the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    module = importlib.import_module(f"contenders.{sys.argv[1]}")
    print(json.dumps({"cases": sorted(module.CASES)}), file=answers, flush=True)
    ready: dict[str, Callable[[], None]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        case = request["case"]
        if request["do"] == "drop":
            ready.clear()
            answer: dict[str, float] = {}
        else:
            if case not in ready:
                ready[case] = module.CASES[case]()
                ready[case]()
            start = time.perf_counter()
            ready[case]()
            answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
