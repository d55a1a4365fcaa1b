"""The table with its columns, rows and cells, and states that show a failure."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from ntkdp._results.plain_json import as_json
from ntkdp.counterexamples import Counterexample

COLUMNS = (
    "symmetric",
    "positive quadratic form",
    "positive eigenvalues",
    "loss converges",
    "monotone",
    "to zero loss",
)


@dataclass(frozen=True)
class State:
    """A state with one output, squared loss, targets zero and flat abadi clipping.

    Evidence in the table of :func:`compute`.
    """

    kernel: tuple[tuple[float, ...], ...]
    outputs: tuple[float, ...]
    clip_norm: float

    def to_json(self) -> str:
        """The state as a JSON object."""
        fields = {"kind": "state", "kernel": self.kernel, "outputs": self.outputs}
        return json.dumps(fields | {"rule": "abadi", "R": self.clip_norm, "scope": "flat"})


@dataclass(frozen=True)
class Cell:
    """One entry of the table: the guarantee of the paper, and a measurement.

    ``paper`` is None if the paper does not say. ``value`` is the number that ``evidence`` names;
    ``holds`` says whether it supports ``guaranteed``, which is the paper's answer, or the computed
    one if the paper has none. ``added`` says what else is known; ``added_holds`` is measured too.

    Part of the table of :func:`compute`.
    """

    column: str
    paper: bool | None
    guaranteed: bool
    evidence: str
    value: float
    holds: bool
    added: str = ""
    added_holds: bool = True
    example: Counterexample | State | None = None

    @property
    def answer(self) -> Literal["yes", "no"]:
        """Whether the property is guaranteed."""
        return "yes" if self.guaranteed else "no"

    def as_dict(self) -> dict[str, Any]:
        """The entry as JSON can hold it, with the instance."""
        return {
            "column": self.column,
            "paper": {True: "yes", False: "no", None: "not stated"}[self.paper],
            "computed": self.answer,
            "evidence": self.evidence,
            "value": as_json(self.value),
            "holds": self.holds,
            "added": self.added,
            "added_holds": self.added_holds,
            "example": None if self.example is None else json.loads(self.example.to_json()),
        }


@dataclass(frozen=True)
class Row:
    """One kind of clipping: its matrix and its cells, in the order of `COLUMNS`.

    Part of the table of :func:`compute`.
    """

    clipping: str
    matrix: str
    cells: tuple[Cell, ...]

    @property
    def holds(self) -> bool:
        """Whether the evidence supports every cell."""
        return all(cell.holds and cell.added_holds for cell in self.cells)


@dataclass(frozen=True)
class Table:
    """All rows of the table.

    Made by :func:`compute`.
    """

    rows: tuple[Row, ...]

    @property
    def holds(self) -> bool:
        """Whether the evidence supports every cell."""
        return all(row.holds for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """The table as JSON can hold it."""
        return {
            "columns": list(COLUMNS),
            "holds": self.holds,
            "rows": [
                {
                    "clipping": row.clipping,
                    "matrix": row.matrix,
                    "cells": [cell.as_dict() for cell in row.cells],
                }
                for row in self.rows
            ],
        }
