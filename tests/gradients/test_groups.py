"""Parameter groups: the default ones by hand, prefixes as in optax, and what is refused."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

from ntkdp._gradients import groups as _groups

ONE = jnp.ones(2)
LAYER = {"kernel": ONE, "bias": ONE}


@pytest.mark.parametrize(
    ("params", "names", "leaf_to_group"),
    [
        # A stax network: a layer without parameters is an empty tuple.
        ([(ONE, ONE), (), (ONE, ONE), (), (ONE,)], ("0", "2", "4"), (0, 0, 1, 1, 2)),
        # flax: one collection, whose children are the layers, sorted by key.
        (
            {"params": {"Dense_1": LAYER, "Dense_0": LAYER}},
            ("params/Dense_0", "params/Dense_1"),
            (0, 0, 1, 1),
        ),
        # One layer: its container is the group, not its arrays.
        ({"params": {"Dense_0": LAYER}}, ("params/Dense_0",), (0, 0)),
        # An empty sibling does not stop the descent.
        ({"params": {"a": LAYER, "b": LAYER}, "state": {}}, ("params/a", "params/b"), (0, 0, 1, 1)),
        # Nested once more, a block is a group.
        ({"net": {"enc": {"x": LAYER, "y": LAYER}, "dec": LAYER}}, ("net/dec", "net/enc"), None),
        # Arrays at the top are groups of their own.
        ({"W": ONE, "b": ONE}, ("W", "b"), (0, 1)),
        ([ONE], ("0",), (0,)),
        (ONE, ("params",), (0,)),
    ],
)
def test_default_groups(params: Any, names: tuple[str, ...], leaf_to_group: Any) -> None:
    groups = _groups.resolve(params)
    assert groups.names == names
    assert groups.size == len(names)
    if leaf_to_group is not None:
        assert groups.leaf_to_group == leaf_to_group
    assert len(groups.leaf_to_group) == len(jax.tree.leaves(params))


def test_a_module_is_grouped_by_its_fields() -> None:
    net = eqx.nn.MLP(2, 1, 3, depth=1, key=jax.random.key(0))
    params = eqx.filter(net, eqx.is_inexact_array)
    groups = _groups.resolve(params)
    assert groups.names == ("layers/0", "layers/1")
    assert groups.leaf_to_group == (0, 0, 1, 1)


def test_a_prefix_labels_as_in_optax() -> None:
    params = {"a": LAYER, "b": {"c": LAYER, "d": ONE}}
    prefix = {"a": "slow", "b": {"c": "fast", "d": "slow"}}
    groups = _groups.resolve(params, prefix)
    assert groups.names == ("slow", "fast")
    assert groups.leaf_to_group == (0, 0, 1, 1, 0)
    # The same leaves move in optax when only one label is trained.
    transforms = {"slow": optax.set_to_zero(), "fast": optax.sgd(1.0)}
    transformation = optax.multi_transform(transforms, prefix)
    updates, _ = transformation.update(params, transformation.init(params))
    moved = [int(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(updates)]
    assert moved == list(groups.leaf_to_group)


def test_one_label_for_everything() -> None:
    groups = _groups.resolve({"a": LAYER, "b": ONE}, "everything")
    assert groups == _groups.Groups(("everything",), (0, 0, 0))


def test_a_callable_labels_key_paths() -> None:
    seen = []

    def label(path: str) -> str:
        seen.append(path)
        return "biases" if path.endswith("bias") else "kernels"

    groups = _groups.resolve({"params": {"a": LAYER, "b": LAYER}}, label)
    assert groups == _groups.Groups(("biases", "kernels"), (0, 1, 0, 1))
    assert seen == ["params/a/bias", "params/a/kernel", "params/b/bias", "params/b/kernel"]


def test_a_prefix_that_is_a_callable_module_is_a_prefix() -> None:
    net = eqx.filter(eqx.nn.MLP(2, 1, 3, depth=1, key=jax.random.key(0)), eqx.is_inexact_array)
    labels = jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else "vector", net)
    groups = _groups.resolve(net, labels)
    assert groups == _groups.Groups(("matrix", "vector"), (0, 1, 0, 1))


def test_labels_may_be_numbers() -> None:
    groups = _groups.resolve([ONE, ONE, ONE], [2, 0, 2])
    assert groups == _groups.Groups(("2", "0"), (0, 1, 0))


@pytest.mark.parametrize("groups", [{"a": 1}, {"a": 1, "b": {"c": 2}}, ["x", "y"]])
def test_a_prefix_that_does_not_fit(groups: Any) -> None:
    with pytest.raises(
        ValueError, match=r"groups must be a pytree prefix of params, .* got"
    ) as info:
        _groups.resolve({"a": LAYER, "b": ONE}, groups)
    assert repr(groups) in str(info.value)


@pytest.mark.parametrize("empty", [{}, [], (), None, [(), {}]])
def test_empty_parameters(empty: Any) -> None:
    with pytest.raises(ValueError, match="params must hold at least one array, got an empty"):
        _groups.resolve(empty)


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (jnp.ones(2, int), "int64"),
        (jnp.ones(2, complex), "complex128"),
        (1, "int"),
        (jnp.ones(2, bool), "bool"),
        (jax.random.key(0), "key<fry>"),
        (jnp.tanh, "PjitFunction"),
        ("a", "str"),
    ],
)
def test_leaves_that_cannot_be_trained(leaf: Any, kind: str) -> None:
    with pytest.raises(
        TypeError, match=rf"params\['b'\] must be a floating-point array, got {kind}"
    ):
        _groups.resolve({"a": ONE, "b": leaf})


def test_labels_that_cannot_be_told_apart() -> None:
    with pytest.raises(TypeError, match=r"group labels must be hashable, got \['x'\]"):
        _groups.resolve({"a": ONE}, lambda path: ["x"])  # type: ignore[return-value]
