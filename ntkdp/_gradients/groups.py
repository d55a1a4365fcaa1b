"""Parameter groups: which leaf of the parameters belongs to which group, and its name."""

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeAlias

import jax

from ntkdp._backend import validate
from ntkdp._backend.types import Params, PyTree

#: A pytree prefix of labels, a callable from key path to label, or None for the default groups.
GroupSpec: TypeAlias = PyTree | Callable[[str], Hashable] | None
#: Keys from the root of a pytree to a node.
_KeyPath: TypeAlias = tuple[Hashable, ...]


class Groups(NamedTuple):
    """Names of the groups, and the index of the group of each leaf, in the order of the leaves."""

    names: tuple[str, ...]
    leaf_to_group: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of groups."""
        return len(self.names)

    def leaves_of(self, names: tuple[str, ...] | None) -> tuple[bool, ...]:
        """Whether each leaf belongs to one of the groups named; None names all.

        Raises
        ------
        ValueError
            If a name is not known; the message gives those that are.
        """
        if names is None:
            return (True,) * len(self.leaf_to_group)
        for name in names:
            validate.choice(self.names, group=name)
        return tuple(self.names[group] in names for group in self.leaf_to_group)

    def select(self, names: tuple[str, ...] | None) -> "Groups":
        """The groups named, in the order that they have here, over their own leaves alone."""
        kept = self.leaves_of(names)
        groups = [group for group, keep in zip(self.leaf_to_group, kept, strict=True) if keep]
        order = sorted(set(groups))
        return Groups(
            tuple(self.names[group] for group in order), tuple(order.index(g) for g in groups)
        )


def _name(path: _KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _children(tree: PyTree) -> list[tuple[Hashable, PyTree]] | None:
    """Direct children as (key, subtree), or None for a leaf."""
    if jax.tree_util.all_leaves([tree]):
        return None
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: node is not tree)
    return [(path[0], child) for path, child in flat]


def _default_labels(params: Params) -> list[str]:
    prefix: _KeyPath = ()
    node = params
    while True:
        children = _children(node)
        if children is None:
            return [_name(prefix) or "params"]
        filled = [(key, child) for key, child in children if jax.tree.leaves(child)]
        if len(filled) == 1:
            key, child = filled[0]
            grandchildren = _children(child) or []
            if any(_children(sub) is not None for _, sub in grandchildren):
                prefix, node = (*prefix, key), child
                continue
        return [_name((*prefix, key)) for key, child in filled for _ in jax.tree.leaves(child)]


def resolve(params: Params, groups: GroupSpec = None) -> Groups:
    """Groups of ``params``.

    The default descends from the root while a node has exactly one child that is not empty, and
    that child has containers as children. Each child there that is not empty is a group, named by
    its key path.

    Raises
    ------
    ValueError
        If a prefix does not fit the parameters, or the parameters are empty.
    TypeError
        If a leaf is not a real floating-point array, or a label is not hashable.
    """
    leaves = jax.tree_util.tree_leaves_with_path(validate.parameters(params=params))
    if groups is None:
        labels: list[Hashable] = list(_default_labels(params))
    elif callable(groups) and jax.tree_util.all_leaves([groups]):
        labels = [groups(_name(path)) for path, _ in leaves]
    else:
        labels = _prefix_labels(params, groups)
    for label in labels:
        if not isinstance(label, Hashable):
            raise TypeError(f"group labels must be hashable, got {label!r}")
    unique = list(dict.fromkeys(labels))
    index = {label: i for i, label in enumerate(unique)}
    return Groups(tuple(str(u) for u in unique), tuple(index[label] for label in labels))


def _prefix_labels(params: Params, groups: PyTree) -> list[Hashable]:
    labels: list[Hashable] = []
    try:
        jax.tree.map(
            lambda label, part: labels.extend([label] * len(jax.tree.leaves(part))), groups, params
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"groups must be a pytree prefix of params, whose structure is "
            f"{jax.tree.structure(params)}; got {groups!r}"
        ) from error
    return labels
