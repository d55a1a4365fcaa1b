"""The table: its columns, rows and cells, and states that show a failure."""

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
    """A state of one output: squared loss, targets zero, flat abadi clipping.

    Evidence in the table of :func:`compute`.
    """

    kernel: tuple[tuple[float, ...], ...]
    outputs: tuple[float, ...]
    clip_norm: float

    def to_json(self) -> str:
        """One JSON object."""
        fields = {"kind": "state", "kernel": self.kernel, "outputs": self.outputs}
        return json.dumps(fields | {"rule": "abadi", "R": self.clip_norm, "scope": "flat"})


@dataclass(frozen=True)
class Cell:
    """One entry: what the paper guarantees, and what was measured.

    ``paper`` is None where the paper does not say. ``value`` is the number that ``evidence`` names;
    ``holds`` whether it bears out ``guaranteed``, which is the paper's answer, or the computed one
    where it has none. ``added`` says what is known beyond it, with ``added_holds`` measured too.

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
        """Whether it is guaranteed."""
        return "yes" if self.guaranteed else "no"

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it, the instance included."""
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
        """Whether every cell is borne out."""
        return all(cell.holds and cell.added_holds for cell in self.cells)


@dataclass(frozen=True)
class Table:
    """All rows.

    Made by :func:`compute`.
    """

    rows: tuple[Row, ...]

    @property
    def holds(self) -> bool:
        """Whether every cell is borne out."""
        return all(row.holds for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
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
