"""Programs of users: right ones type-check, wrong arguments are reported, every name completes."""

import re
import subprocess
import sys

import pytest
from helpers import DOCS, ROOT

sys.path.insert(0, str(DOCS))

import public_names

RIGHT = """
import jax
import jax.numpy as jnp

import ntkdp
from ntkdp import clipping, dp_sgd, losses, privacy

x = jnp.ones((8, 3))
labels = jnp.arange(8) % 2
model = ntkdp.models.mlp([16], 2, activation="tanh")
params = model.init(jax.random.key(0), x)
loss, rule = losses.SoftmaxCrossEntropy(), clipping.Abadi(0.5, scope="layerwise")
own_rule = clipping.Custom(lambda s: 1 / (1 + s), 1.0, "flat")
rules = (clipping.PSAC(1.0, 0.5), clipping.Global(1.0, 2.0, "flat"), clipping.Automatic(1.0, 0.1))
own_model = ntkdp.models.from_stax(lambda key, shape: ((2,), ()), lambda params, x: x)
kernel = ntkdp.layerwise_ntk(model.apply, params, x)
flow = ntkdp.KernelFlow(kernel, labels, loss, rule)
run = dp_sgd.run(
    model.apply, params, x, labels, loss, rule, learning_rate=0.1, steps=5,
    noise_multiplier=1.0, sample_rate=0.5, key=jax.random.key(1),
)
predicted = ntkdp.solve(flow, model.apply(params, x), run.times)
weights = ntkdp.WeightFlow(model.apply, x, labels, loss, rule)
slow = ntkdp.solve(weights, params, [0.0, 0.5], rtol=1e-4)
comparison = ntkdp.compare(predicted, run)
print(comparison.errors, slow.loss[-1])
epsilon: float = privacy.epsilon(1.0, 0.5, 5, 1e-5)
sigma: float = privacy.noise_multiplier(epsilon, 0.5, 5, 1e-5)
"""

#: Every line with a comment is wrong, in what the comment names.
WRONG = """
import jax
import jax.numpy as jnp

import ntkdp
from ntkdp import clipping, dp_sgd, losses, privacy

x, labels = jnp.ones((8, 3)), jnp.arange(8) % 2
model = ntkdp.models.mlp([16], 2, activation="tanh")
params = model.init(jax.random.key(0), x)
rule = clipping.Abadi("0.5")  # arg-type
unknown = clipping.Abadi(0.5, scope="by layer")  # arg-type
loss = losses.SquaredEror()  # attr-defined
kernel = ntkdp.empirical_ntk(model.apply, params, x, batch_size="all")  # arg-type
flow = ntkdp.KernelFlow(kernel, labels, losses.Huber(1.0), 0.5)  # arg-type
path = ntkdp.solve(flow, model.apply(params, x), [0.0, 1.0], steps=3)  # call-arg
run = dp_sgd.run(
    model.apply, params, x, labels, losses.Huber(1.0), clipping.Abadi(0.5), learning_rate=0.1,
    steps="5",  # arg-type
    key=jax.random.key(0),
)
compared = ntkdp.compare(path, 3.0)  # arg-type
spent = privacy.epsilon("1.0", 0.5, 5, 1e-5)  # arg-type
missing = privacy.epsilon(1.0, 0.5, 5)  # call-arg
lost = run.looss  # attr-defined
"""


def _all_names() -> str:
    """A program that reads every public name where users find it."""
    names = [name.qualified for name in public_names.public_names()]
    modules = sorted({name.rpartition(".")[0] for name in names})
    return "\n".join(["import ntkdp", *(f"import {m}" for m in modules), *names])


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]]]:
    """Lines and codes of the errors in each program, as of an installed ntkdp."""
    folder = tmp_path_factory.mktemp("programs")
    for name, program in {"right": RIGHT, "wrong": WRONG, "names": _all_names()}.items():
        (folder / f"{name}.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--show-error-codes"]
    command += [f"--cache-dir={ROOT / '.mypy_cache' / 'users'}", "right.py", "wrong.py", "names.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    found: dict[str, list[tuple[int, str]]] = {"right": [], "wrong": [], "names": []}
    for file, line, code in re.findall(r"^(\w+)\.py:(\d+): error: .*\[(.*)\]$", done.stdout, re.M):
        found[file].append((int(line), code))
    return found


@pytest.mark.slow
def test_a_right_program_has_no_error(reported: dict[str, list[tuple[int, str]]]) -> None:
    assert reported["right"] == []


@pytest.mark.slow
def test_wrong_arguments_are_reported_where_they_stand(
    reported: dict[str, list[tuple[int, str]]],
) -> None:
    expected = [
        (number, line.rpartition("# ")[2])
        for number, line in enumerate(WRONG.splitlines(), 1)
        if "# " in line
    ]
    assert sorted(set(reported["wrong"])) == expected


@pytest.mark.slow
def test_every_public_name_completes(reported: dict[str, list[tuple[int, str]]]) -> None:
    names = _all_names().splitlines()
    assert [names[line - 1] for line, _ in reported["names"]] == []
