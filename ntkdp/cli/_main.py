"""The command from its first moment, before anything heavy is imported."""

import os
import sys

from ntkdp._backend import stopping
from ntkdp._results import standard_streams


def main() -> None:
    """Entry point of the ``ntkdp`` command.

    Exits with 0 if all is well, 1 if what was to be verified does not hold, 2 after an error, and
    128 + n after the signal n.
    """
    lost = standard_streams.replace()
    stopping.begin()
    # Checks inside compiled programs call back to Python, and such programs are not kept. What they
    # check has been checked before.
    os.environ.setdefault("EQX_ON_ERROR", "off")
    try:
        from ntkdp.cli._app import app

        app()
    finally:
        stopping.end()
        sys.stdout.flush()
        if lost.error is not None:
            reason = lost.error.strerror
            print(f"ntkdp: error: standard output cannot be written to: {reason}", file=sys.stderr)
            sys.exit(2)
