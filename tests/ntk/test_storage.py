"""Kernels on disk: they come back as they were, and what is no kernel is named."""

import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ntkdp
from ntkdp import FeatureKernel, LayerwiseKernel, ntk

KEY = jax.random.key(0)
KERNELS: dict[str, Any] = {
    "blocks": jax.random.normal(KEY, (3, 2, 2, 2)),
    "matrix": jax.random.normal(KEY, (3, 3), jnp.float32),
    "not finite": jnp.array([[np.nan, np.inf]]),
    "layerwise": LayerwiseKernel(("\u03b1", "b/c"), jax.random.normal(KEY, (2, 3, 2))),
    "layers of blocks": LayerwiseKernel(("a",), jax.random.normal(KEY, (1, 3, 2, 2, 2))),
    "features": FeatureKernel(jax.random.normal(KEY, (3, 2)), jax.random.normal(KEY, (4, 2))),
    "half": FeatureKernel(jax.random.normal(KEY, (3, 2), jnp.bfloat16)),
}


def assert_same(found: Any, kernel: Any) -> None:
    assert type(found) is type(kernel)
    if isinstance(kernel, LayerwiseKernel):
        assert found.names == kernel.names
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(kernel), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_a_kernel_comes_back_as_it_was(kernel: Any, tmp_path: Path) -> None:
    path = tmp_path / "kernel.npz"
    ntk.save_kernel(kernel, path)
    assert_same(ntk.load_kernel(path), kernel)
    assert os.listdir(tmp_path) == ["kernel.npz"]
    if isinstance(kernel, LayerwiseKernel | FeatureKernel):
        kernel.save(path)
        assert_same(type(kernel).load(path), kernel)


@given(
    terms=st.integers(1, 4),
    rows=st.integers(0, 3),
    columns=st.integers(0, 3),
    names=st.lists(st.text(), min_size=4),
)
def test_kernels_of_any_size_and_name_come_back(
    terms: int, rows: int, columns: int, names: list[str], tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("kernels") / "kernel.npz"
    values = jnp.arange(float(terms * rows * columns)).reshape(terms, rows, columns)
    kernel = LayerwiseKernel(tuple(names[:terms]), values)
    kernel.save(path)
    assert_same(LayerwiseKernel.load(path), kernel)


def test_numpy_reads_the_arrays(tmp_path: Path) -> None:
    """Without pickle, and any reader of ZIP finds a checksum of each."""
    path = tmp_path / "kernel.npz"
    ntk.save_kernel(KERNELS["blocks"], path)
    with np.load(path, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["values"], KERNELS["blocks"])
    with zipfile.ZipFile(path) as members:
        assert members.testzip() is None


def test_a_prediction_by_a_loaded_kernel_is_the_same(tmp_path: Path) -> None:
    x = jax.random.normal(KEY, (6, 3))
    y = jnp.sign(x[:, :1])
    path = tmp_path / "kernel.npz"
    FeatureKernel(x).save(path)

    def predicted(kernel: Any) -> Any:
        flow = ntkdp.KernelFlow(kernel, y, ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0))
        return ntkdp.recursion(flow, jnp.zeros_like(y), learning_rate=0.1, steps=3).loss

    np.testing.assert_array_equal(predicted(FeatureKernel.load(path)), predicted(FeatureKernel(x)))


def relabelled(**changes: Any) -> Callable[[Path], None]:
    """Write the file again with another label."""

    def change(path: Path) -> None:
        with np.load(path) as archive:
            members = dict(archive)
        label = json.loads(str(members.pop("kernel")))
        label |= {name: value for name, value in changes.items() if name != "arrays"}
        np.savez(path, kernel=np.array(json.dumps(label)), **changes.get("arrays", members))

    return change


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(np.float64(1.25).tobytes())] ^= 1
    path.write_bytes(bytes(data))


def pickled(path: Path) -> None:
    np.savez(path, kernel=np.array([{}], dtype=object))


def compressed(path: Path) -> None:
    np.savez_compressed(path, kernel=np.zeros(100))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_text("no archive"), "path is no file of a kernel, or damaged"),
        (lambda path: path.write_bytes(b""), "path is no file of a kernel, or damaged"),
        (cut, "path is no file of a kernel, or damaged"),
        (flipped, "path is no file of a kernel, or damaged"),
        (pickled, "path is no file of a kernel, or damaged"),
        (compressed, "kernel.npy is compressed"),
        (lambda path: np.savez(path, values=np.eye(2)), "path is no file of a kernel, or damaged"),
        (
            relabelled(format=2, ntkdp="9.0"),
            "path has format 2, and ntkdp 0.1.0 reads format 1: ",
        ),
        (relabelled(format=2, ntkdp="9.0"), "was written by ntkdp 9.0; use that version, or save"),
        (relabelled(kind="unknown"), "path holds no kernel: "),
        (relabelled(kind="features"), "it has the arrays ['values']"),
        (relabelled(kind="layerwise", names=["a"]), "values must have shape (R, n1, n2, K, K)"),
        (relabelled(computed_in={"values": "float7"}), "path holds no kernel: "),
        (relabelled(arrays={"values": np.eye(2, dtype=complex)}), "path holds no kernel: "),
        (relabelled(arrays={"values": np.ones(3)}), "kernel must be an array of shape (n1, n2)"),
    ],
)
def test_what_is_no_kernel_is_named(
    change: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "kernel.npz"
    ntk.save_kernel(jnp.full((2, 2), 1.25), path)
    change(path)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        ntk.load_kernel(path)
    assert str(path) in str(caught.value)


def test_arguments_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "kernel.npz"
    for wrong in (jnp.ones(3), jnp.ones((2, 2, 3, 4)), jnp.ones((2, 2), int)):
        with pytest.raises(ValueError, match="kernel must be an array of shape"):
            ntk.save_kernel(wrong, path)
    with pytest.raises(TypeError, match="kernel"):
        ntk.save_kernel("kernel", path)  # type: ignore[arg-type]
    assert not path.exists()
    with pytest.raises(FileNotFoundError, match="folder of path does not exist"):
        ntk.save_kernel(jnp.eye(2), tmp_path / "absent" / "kernel.npz")
    with pytest.raises(FileNotFoundError, match="path does not exist"):
        ntk.load_kernel(path)
    with pytest.raises(ValueError, match="no plain file"):
        ntk.load_kernel(tmp_path)
    ntk.save_kernel(jnp.eye(2), path)
    with pytest.raises(ValueError, match="path must hold a LayerwiseKernel, got an array"):
        LayerwiseKernel.load(path)


def test_a_kernel_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernel.npz"
    ntk.save_kernel(jnp.eye(2), path)

    def fails(file: Any, **members: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(OSError, match="No space left"):
        ntk.save_kernel(jnp.ones((3, 3)), path)
    assert_same(ntk.load_kernel(path), jnp.eye(2))
    assert os.listdir(tmp_path) == ["kernel.npz"]
