"""The command ``ntkdp`` from its first moment: what can stop it is seen to before anything heavy is
imported.
"""

import sys
from typing import Any

from ntkdp._backend import stopping
from ntkdp._results import standard_streams


def main() -> None:
    """Entry point of the ``ntkdp`` command.

    Exits with 0 if all is well, 1 if what was to be verified does not hold, 2 after an error, and
    128 + n after the signal n.
    """
    lost = standard_streams.replace()
    stopping.begin()
    try:
        from ntkdp._app import app

        app()
    finally:
        stopping.end()
        sys.stdout.flush()
        if lost.error is not None:
            reason = lost.error.strerror
            print(f"ntkdp: error: standard output cannot be written to: {reason}", file=sys.stderr)
            sys.exit(2)


def __getattr__(name: str) -> Any:
    if name == "app":
        from ntkdp._app import app

        return app
    raise AttributeError(f"module 'ntkdp.cli' has no attribute {name!r}")
