"""Times ntkdp next to its peers on this machine: ``make bench``.

Every peer runs in a process and an environment of its own; within a comparison all take turns of a
quarter of a second, so that a drift of the machine's speed meets all. Prints medians and ratios,
and writes them to ``docs/benchmarks.md``. Run it on a machine that does nothing else.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import growth
import problems
from rich.console import Console
from rich.markdown import Markdown

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"

#: Environments by name: what uv installs for it, nothing for the project's own.
OWN: tuple[str, ...] = ()
OLD_JAX = ("neural-tangents==0.6.5", "jax==0.4.25", "jaxlib==0.4.25", "numpy<2", "scipy<1.13")
OPACUS = ("torch==2.13.0", "opacus==1.6.0")
JAX_PRIVACY = ("jax-privacy==2.0.0", "jax==0.10.2", "jaxlib==0.10.2", "optax==0.2.8")

#: Least number of turns of a contender.
FEWEST_TURNS = 3
#: Largest number of turns of a contender.
MOST_TURNS = 15
#: Seconds after which a contender gets no further turn.
MOST_SECONDS = 15.0


class Contender(NamedTuple):
    """Who does the work, in which environment and checkout."""

    label: str
    environment: tuple[str, ...]
    module: str
    case: str
    checkout: Path = HERE.parent


def _kernel_peers(
    case: str, modes: tuple[str, ...] = ("jacobian contraction", "NTK-vector products")
) -> list[Contender]:
    peers = [
        Contender(
            "neural-tangents, structured derivatives, JAX 0.4.25",
            OLD_JAX,
            "neural_tangents_",
            f"{case}, structured derivatives",
        )
    ]
    for mode in modes:
        label = f"neural-tangents, {mode}, the JAX of ntkdp"
        peers.append(Contender(label, OWN, "neural_tangents_", f"{case}, {mode}"))
    return peers


def _step_peers(case: str) -> list[Contender]:
    return [
        Contender("step without privacy", OWN, "plain_jax", f"{case}, no privacy"),
        Contender("step with the noise alone", OWN, "plain_jax", f"{case}, noise alone"),
        Contender("opacus, ghost clipping", OPACUS, "opacus_", f"{case}, ghost clipping"),
        Contender(
            "opacus, per-sample gradients", OPACUS, "opacus_", f"{case}, per-sample gradients"
        ),
        Contender("torch.func, mapped", OPACUS, "opacus_", f"{case}, torch.func"),
        Contender("optax", OWN, "optax_", case),
        Contender("jax-privacy", JAX_PRIVACY, "jax_privacy_", case),
    ]


COMPARISONS: dict[str, list[Contender]] = {
    "kernel of an MLP, width 512": _kernel_peers("kernel of an MLP, width 512"),
    # The other mode would hold a Jacobian of 15 GB.
    "kernel of an MLP, width 2048": _kernel_peers(
        "kernel of an MLP, width 2048", ("NTK-vector products",)
    ),
    problems.KERNEL_CNN: _kernel_peers(problems.KERNEL_CNN),
    problems.TRANSFORMER: [
        Contender(
            f"per-sample Jacobians, {samples} samples at a time",
            OWN,
            "plain_jax",
            f"{problems.TRANSFORMER}, blocks of {samples}",
        )
        for samples in (8, 16, 32)
    ],
    problems.STEP_MLP: _step_peers(problems.STEP_MLP),
    problems.STEP_CNN: _step_peers(problems.STEP_CNN),
}


class Worker:
    """A process that times the cases of one module in one environment."""

    def __init__(self, contender: Contender) -> None:
        command = [sys.executable]
        if contender.environment:
            needed = [part for package in contender.environment for part in ("--with", package)]
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            command = [
                "uv",
                "run",
                "--no-project",
                "--quiet",
                "--python",
                version,
                *needed,
                "python",
            ]
        command += [str(contender.checkout / "benchmarks" / "worker.py"), contender.module]
        # Elsewhere than in the project, whose pinned versions uv would apply to the peers.
        self.folder = tempfile.TemporaryDirectory()
        self.log = Path(self.folder.name) / "log"
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            cwd=self.folder.name,
            env={
                **os.environ,
                "OMP_WAIT_POLICY": "passive",
                "PYTHONPATH": str(contender.checkout) if not contender.environment else "",
            },
        )
        self._read()

    def _read(self) -> dict[str, list[float]]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended: ...{self.log.read_text()[-1500:]}")
        return json.loads(line)

    def ask(self, case: str) -> list[float]:
        """Seconds of the calls of one turn, made ready before if it is the first."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"case": case}) + "\n")
        self.process.stdin.flush()
        return self._read()["seconds"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


def measure(contenders: list[Contender], console: Console) -> dict[str, list[float] | str]:
    """Seconds of each contender's calls, taken in turns; or why it could not be timed."""
    workers: dict[str, Worker] = {}
    seconds: dict[str, list[float] | str] = {}
    for contender in contenders:
        console.print(f"  preparing {contender.label}")
        try:
            workers[contender.label] = Worker(contender)
            workers[contender.label].ask(contender.case)
            seconds[contender.label] = []
        except (RuntimeError, OSError) as error:
            seconds[contender.label] = str(error).strip().splitlines()[-1]
    for _ in range(MOST_TURNS):
        for contender in contenders:
            taken = seconds[contender.label]
            if isinstance(taken, str):
                continue
            if len(taken) >= FEWEST_TURNS and sum(taken) > MOST_SECONDS:
                continue
            taken.extend(workers[contender.label].ask(contender.case))
    for worker in workers.values():
        worker.close()
    return seconds


def table(case: str, contenders: list[Contender], seconds: dict[str, list[float] | str]) -> str:
    """Medians, and the time of ntkdp as a multiple of each, in Markdown."""
    rows = [f"## {case[0].upper()}{case[1:]}", "", "| | median | fastest | ntkdp / this |"]
    rows.append("|---|---:|---:|---:|")
    own = seconds["ntkdp"]
    for contender in contenders:
        taken = seconds[contender.label]
        if isinstance(taken, str) or isinstance(own, str):
            rows.append(f"| {contender.label} | {taken} | | |")
            continue
        ratio = statistics.median(own) / statistics.median(taken)
        rows.append(
            f"| {contender.label} | {_milliseconds(statistics.median(taken))} | "
            f"{_milliseconds(min(taken))} | "
            f"{'' if contender.label == 'ntkdp' else f'{ratio:.3g}'} |"
        )
    return "\n".join(rows)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _machine() -> str:
    import jax

    kind = jax.devices()[0].device_kind
    return f"{os.cpu_count()} cores, {platform.machine()}, JAX {jax.__version__} on {kind}"


def main() -> None:
    """Measure everything, print it, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this; writes nothing")
    parser.add_argument(
        "--against",
        type=Path,
        help="checkout of another version, in place of peers; writes nothing",
    )
    given = parser.parse_args()
    only, writes = given.only, not (given.only or given.against)
    console = Console()
    parts = []
    for case, peers in COMPARISONS.items():
        if only in case:
            console.print(case)
            if given.against:
                other = given.against.resolve()
                peers = [Contender("the other version", OWN, "ntkdp_", case, other)]
            contenders = [Contender("ntkdp", OWN, "ntkdp_", case), *peers]
            parts.append(table(case, contenders, measure(contenders, console)))
            console.print(Markdown(parts[-1]))
    if only in "growth" and not given.against:
        console.print("growth")
        parts.append(growth.table())
        console.print(Markdown(parts[-1]))
    if writes:
        page = HEADER.format(machine=_machine()) + "\n\n".join(parts) + "\n"
        temporary = PAGE.with_suffix(".partial")
        temporary.write_text(page)
        temporary.replace(PAGE)
        console.print(f"written to {PAGE}")


HEADER = """# Benchmarks

`make bench` measured these on: {machine}; float32, medians of calls taken in turns with the peers,
each in a process and an environment of its own, after a warm-up. ntkdp computes every layer term of
a kernel, its peers the total; its step returns norms, clip fraction and noise diagnostics with the
update. A ratio below one means that ntkdp is faster.

"""

if __name__ == "__main__":
    main()
