"""Trajectories know what they are of: what does not belong together is named, by every part."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import linear

import ntkdp
from ntkdp import clipping, compare, dp_sgd, losses, stochastic_flow
from ntkdp._results import setup as setups
from ntkdp.dp_sgd import _seeds
from ntkdp.experiment import _run

KEY_X, KEY_Y = jax.random.split(jax.random.key(3))
X, Y = jax.random.normal(KEY_X, (6, 4)), jax.random.normal(KEY_Y, (6, 2))
START = jnp.zeros((6, 2))
RULE = clipping.Abadi(1.0)
STEPS: dict[str, Any] = {"learning_rate": 0.1, "steps": 8, "record_every": 2}
MOMENTUM = partial(optax.sgd, momentum=0.5)


def observed(rule: Any = RULE, loss: Any = None, **options: Any) -> ntkdp.Trajectory:
    loss = losses.SquaredError() if loss is None else loss
    options = STEPS | {"key": jax.random.key(0)} | options
    return dp_sgd.run(linear, jnp.zeros((4, 2)), X, Y, loss, rule, **options)


def flow(rule: Any = RULE, **options: Any) -> ntkdp.KernelFlow:
    return ntkdp.KernelFlow(X @ X.T, Y, losses.SquaredError(), rule, **options)


def ensemble(rule: Any = RULE, **options: Any) -> ntkdp.Trajectory:
    keys = jax.random.split(jax.random.key(1), 3)
    return stochastic_flow.ensemble(flow(rule), START, key=keys, **(STEPS | options))


@pytest.fixture(scope="module")
def run() -> ntkdp.Trajectory:
    return observed()


@pytest.fixture(scope="module")
def stepped() -> ntkdp.Trajectory:
    return ntkdp.recursion(flow(), START, **STEPS)


def solved(of: Any, run: ntkdp.Trajectory) -> ntkdp.Trajectory:
    return ntkdp.solve(of, START, run.times)


def test_what_belongs_together_compares(run: Any, stepped: Any) -> None:
    assert compare(stepped, run).sup_relative_error < 1e-12
    for predicted in (stepped, solved(flow(), run)):
        found = compare(predicted, run)
        assert (found.differences, found.neglected, found.message) == ({}, (), "success")
    constant = observed(learning_rate=optax.constant_schedule(0.1))
    assert compare(stepped, constant).sup_relative_error < 1e-6
    # A flow is of every small learning rate, and of every schedule.
    for rate in (0.2, optax.linear_schedule(0.2, 0.1, 8)):
        faster = observed(learning_rate=rate)
        assert compare(solved(flow(), faster), faster).message == "success"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("clipping", {"rule": clipping.Abadi(2.0)}, r"Abadi\(R=1, .*Abadi\(R=2, .* in the run"),
        (
            "clipping",
            {"rule": clipping.Automatic(1.0)},
            r"Abadi.* predicted, Automatic\(R=1, gamma",
        ),
        ("loss", {"loss": losses.Huber(9.0)}, r"SquaredError\(\) predicted, Huber\(delta=9\)"),
        ("reduction", {"reduction": "sum"}, "mean predicted, sum in the run"),
        ("learning_rate", {"learning_rate": 0.2}, "0.1 predicted, 0.2 in the run"),
        (
            "learning_rate",
            {"learning_rate": optax.piecewise_constant_schedule(0.1, {4: 0.5})},
            "0.1 predicted, 0.1, 0.1, 0.1, 0.05 in the run",
        ),
        ("optimizer", {"optimizer": optax.adam}, "sgd predicted, adam in the run"),
        ("optimizer", {"optimizer": MOMENTUM}, r"sgd predicted, sgd\(momentum=0.5\) in the run"),
    ],
)
def test_another_training_is_named(stepped: Any, name: str, changes: Any, words: str) -> None:
    run = observed(**changes)
    with pytest.raises(ValueError, match=f"not of the same training: {name}: {words}") as caught:
        compare(stepped, run)
    assert f"pass allow=('{name}',)" in str(caught.value)
    found = compare(stepped, run, allow=name)
    assert list(found.differences) == [name]
    assert name in found.message
    assert name in str(found.table().caption)


def test_another_clipping_norm_is_named_for_a_flow_too(run: Any) -> None:
    other = solved(flow(clipping.Abadi(2.0)), run)
    with pytest.raises(ValueError, match="clipping"):
        compare(other, run)
    with pytest.raises(ValueError, match="clipping"):
        ntkdp.plotting.relative_error(other, run)
    with pytest.raises(ValueError, match="clipping"):
        ntkdp.plotting.comparison_grid({("flat", "R"): (run, {"flow": other})})
    assert ntkdp.plotting.relative_error(other, run, allow="clipping").lines


def test_adam_beside_a_kernel_flow_is_named(run: Any) -> None:
    """And not if the kernel is preconditioned, as that of Adam is."""
    adam = observed(optimizer=optax.adam)
    with pytest.raises(ValueError, match=r"optimizer: sgd predicted, adam in the run"):
        compare(solved(flow(), adam), adam)
    own = solved(flow(preconditioned_kernel=0.5 * X @ X.T), adam)
    assert compare(own, adam).differences == {}


def test_inertia_belongs_to_its_momentum_and_time() -> None:
    run = observed(optimizer=MOMENTUM)
    ball = ntkdp.HeavyBallFlow(flow(), friction=0.5 / 0.1**0.5)
    predicted = ntkdp.solve(ball, START, run.times / 0.1**0.5)
    assert compare(predicted.rescale_time(0.1**0.5), run).differences == {}
    assert compare(predicted, run.rescale_time(0.1**-0.5)).differences == {}
    with pytest.raises(ValueError, match=r"time: .* 0.3162 times that unit .*rescale_time"):
        compare(ntkdp.solve(ball, START, run.times), run)
    faster = observed(optimizer=partial(optax.sgd, momentum=0.9))
    with pytest.raises(ValueError, match=r"heavy ball of momentum 0.5 .*sgd\(momentum=0.9\)"):
        compare(predicted.rescale_time(0.1**0.5), faster)
    with pytest.raises(ValueError, match=r"optimizer: heavy ball predicted, adam"):
        compare(predicted.rescale_time(0.1**0.5), observed(optimizer=optax.adam))


def test_noise_and_sampling() -> None:
    """Of an ensemble they must be those of the run; flows leave them out, and that is told."""
    noisy = observed(noise_multiplier=0.5, sample_rate=0.5)
    drawn = ensemble(noise_multiplier=0.5, sample_rate=0.5)
    assert compare(drawn, noisy).neglected == ()
    for changes, name in (
        ({"noise_multiplier": 1.0, "sample_rate": 0.5}, "noise_multiplier: 1 predicted, 0.5"),
        ({"sample_rate": 0.5}, "noise_multiplier: 0 predicted, 0.5"),
        ({"noise_multiplier": 0.5}, "sample_rate: 1 predicted, 0.5"),
    ):
        with pytest.raises(ValueError, match=name):
            compare(ensemble(**changes), noisy)
    for quiet in (solved(flow(), noisy), ntkdp.recursion(flow(), START, **STEPS)):
        found = compare(quiet, noisy)
        assert found.neglected == ("noise", "sampling")
        assert "leaves out the run's noise and sampling" in str(found.table().caption)
    budget = ntkdp.privacy.Budget(mu=4.0)
    assert compare(ensemble(noise_multiplier=budget), observed(noise_multiplier=budget))


def test_noise_by_group_is_another_noise() -> None:
    drawn, other = (
        setups.Setup(
            clipping=setups.described(RULE),
            loss=setups.described(losses.SquaredError()),
            reduction="mean",
            noise_multiplier=1.0,
            noise_per_group=by_group,
        )
        for by_group in (False, True)
    )
    assert list(setups.differences((drawn,), (other,))) == ["noise_multiplier"]


def test_phases_are_compared_one_by_one(run: Any, stepped: Any) -> None:
    twice = run.then(run)
    assert len(twice.setup) == 2
    assert compare(stepped.then(stepped), twice).differences == {}
    assert compare(solved(flow(), twice), twice).differences == {}
    changed = stepped.then(ntkdp.recursion(flow(clipping.Abadi(2.0)), START, **STEPS))
    with pytest.raises(ValueError, match=r"clipping: .* in phase 2"):
        compare(changed, twice)
    with pytest.raises(ValueError, match="phases: 3 predicted, 2 in the run"):
        compare(stepped.then(stepped).then(stepped), twice)


def test_what_was_made_elsewhere_compares_as_it_is(run: Any) -> None:
    other = solved(flow(clipping.Abadi(2.0)), run)
    unknown = ntkdp.Trajectory(run.times, run.loss, run.clip_fraction, steps=run.steps)
    assert compare(other, unknown).differences == {}
    assert compare(unknown, run).differences == {}
    assert unknown.then(run).setup == ()
    with pytest.raises(ValueError, match="unknown allow 'cliping'; did you mean 'clipping'"):
        compare(other, unknown, allow="cliping")


def test_other_numbers_of_steps_are_named(run: Any, stepped: Any) -> None:
    """And the shared times are compared, from which nothing is missing."""
    longer = ntkdp.recursion(flow(), START, **STEPS | {"steps": 12})
    for predicted, observed_run, steps in ((longer, run, (12, 8)), (stepped, longer, (8, 12))):
        found = compare(predicted, observed_run)
        assert found.steps == steps
        assert found.sup_relative_error < 1e-12
        assert f"The prediction is of {steps[0]} steps, the run of {steps[1]}." in str(found)
    for same in (stepped, solved(flow(), run)):
        assert compare(same, run).steps is None
        assert "steps, the run" not in str(compare(same, run))
    assert compare(stepped.then(stepped), run.then(run)).steps is None
    assert compare(stepped.then(longer), run.then(run)).steps == (20, 16)
    log = dataclasses.replace(run, setup=())
    assert compare(longer, log).steps == (12, 8)


@pytest.mark.parametrize(("rate", "last"), [(0.2, "0.8 is step 8 predicted, step 4"), (0.05, None)])
def test_a_log_of_another_learning_rate_is_named(stepped: Any, rate: float, last: Any) -> None:
    """Some of its times are those of other steps."""
    steps = jnp.arange(0, 9)
    log = ntkdp.Trajectory(rate * steps, jnp.ones(9), jnp.zeros(9), steps=steps)
    with pytest.raises(ValueError, match=f"learning_rate: time {last or '0.4 is step 4'}"):
        compare(stepped, log)
    assert list(compare(stepped, log, allow="learning_rate").differences) == ["learning_rate"]
    times_alone = dataclasses.replace(log, steps=None)
    assert compare(stepped, times_alone).differences == {}


def test_steps_without_a_learning_rate_share_a_time() -> None:
    """With other recorded steps too, which lie at the one time."""

    def rate(step: Any) -> Any:
        return jnp.where((step >= 2) & (step < 6), 0.0, 0.1)

    options = STEPS | {"learning_rate": rate}
    log = dataclasses.replace(observed(**options | {"record_every": 3}), setup=())
    assert compare(ntkdp.recursion(flow(), START, **options), log).differences == {}


def test_a_trajectory_prints_what_it_is_of(run: Any) -> None:
    noisy = observed(noise_multiplier=0.5, sample_rate=0.5, optimizer=MOMENTUM)
    title, *rows, last = str(noisy).splitlines()
    assert title == "Trajectory of 5 times, t = 0 to 0.8, steps 0 to 8"
    assert rows[1].split() == ["training", "loss", f"{noisy.loss[0]:.4g}", f"{noisy.loss[-1]:.4g}"]
    for part in (
        "Abadi(R=1, scope=flat)",
        "SquaredError()",
        "learning rate 0.1",
        "8 steps",
        "noise multiplier 0.5",
        "sample rate 0.5",
        "sgd(momentum=0.5)",
    ):
        assert part in last
    assert "Phase 2: Abadi" in str(run.then(run))
    assert "<td>training loss</td>" in run._repr_html_()
    # What holds no numbers is shown by its fields.
    assert "Trajectory(" in str(jax.tree.map(lambda leaf: None, run))
    texts: list[str] = []

    def traced(path: ntkdp.Trajectory) -> jax.Array:
        texts.append(str(path))
        return path.loss

    jax.jit(traced)(run)
    assert "Trajectory(" in texts[0]


def test_files_and_cells_keep_it(tmp_path: Path) -> None:
    rule = clipping.Automatic(jnp.array([1.0, 2.0]), scope="layerwise")
    path = ntkdp.Trajectory(
        jnp.arange(2.0), jnp.ones(2), jnp.zeros(2), setup=(flow().setup(),)
    ).rescale_time(3.0)
    one = path.setup[0]
    assert one.time_scale == 3.0
    assert dict(setups.described(rule))["R"] == (1.0, 2.0)
    path.save(tmp_path / "path.nc")
    assert ntkdp.Trajectory.load(tmp_path / "path.nc").setup == path.setup
    assert _run._trajectory(_run._fields(path)).setup == path.setup
    for damaged in ("[{}]", "not JSON", "[" * 10000, 3.0):
        dataset = path.to_xarray().assign_attrs(setup=damaged)
        with pytest.raises(ValueError, match="not a trajectory: "):
            ntkdp.Trajectory.from_xarray(dataset)


def test_it_survives_transformations_and_costs_no_compilation() -> None:
    rates = jnp.array([0.1, 0.2])
    steps: dict[str, Any] = {"steps": 3, "record_every": 3}

    def path(rate: Any) -> ntkdp.Trajectory:
        return ntkdp.recursion(flow(), START, learning_rate=rate, **steps)

    both = jax.vmap(path)(rates)
    # What only exists while it runs is not known.
    assert both.setup[0].learning_rate == jax.jit(path)(0.1).setup[0].learning_rate == ()
    assert dict(both.setup[0].clipping)["R"] == (1.0,)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, path(0.1))
    assert doubled.setup[0].learning_rate == (0.1,)
    observed(learning_rate=0.15)
    cached: Any = _seeds.run
    programs = cached._cached._cache_size()
    assert programs > 0
    assert observed(learning_rate=0.25, rule=clipping.Abadi(3.0)).setup[0].learning_rate == (0.25,)
    assert cached._cached._cache_size() == programs


def test_numbers_agree_to_single_precision() -> None:
    single = clipping.Abadi(np.float32(0.1))
    assert setups._same_description(setups.described(single), setups.described(clipping.Abadi(0.1)))
    one, several = clipping.Abadi(1.0, scope="layerwise"), clipping.Abadi([1.0, 1.0], "layerwise")
    assert setups._same_description(setups.described(one), setups.described(several))
    assert not setups._same_description(
        setups.described(one), setups.described(clipping.Abadi([1.0, 2.0], "layerwise"))
    )
