"""JSON that every reader accepts: non-finite numbers are the texts "inf", "-inf" and "nan"."""

import json
import math
from typing import Any


def as_json(value: object) -> Any:
    """The tree with such texts, which ``float`` reads; ``None`` stands for "does not apply"."""
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def as_text(tree: object) -> str:
    """The tree as JSON text for a file."""
    return json.dumps(as_json(tree), indent=2, allow_nan=False)
