"""Norms of many gradients through blocks of a kernel, against those of the gradients."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from ntkdp._backend import norms


@given(st.integers(0, 10**6), st.sampled_from((-30, 0, 30)))
def test_norms_of_many_gradients_through_blocks(seed: int, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    jacobians = rng.normal(size=(2, 3, 5, 4))  # groups, samples, weights, outputs
    a = rng.normal(size=(3, 4, 6)) * 10.0**exponent
    blocks = np.einsum("rnpk,rnpl->rnkl", jacobians, jacobians)
    expected = np.linalg.norm(np.einsum("rnpk,nks->rnps", jacobians, a), axis=2)
    found = norms.through_blocks(jnp.asarray(blocks), jnp.asarray(a))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_a_gradient_of_zero_has_no_length() -> None:
    assert norms.through_blocks(jnp.ones((1, 2, 3, 3)), jnp.zeros((2, 3, 4))).tolist() == [
        [[0.0] * 4] * 2
    ]
