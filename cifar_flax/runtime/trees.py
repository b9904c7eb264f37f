"""Utilities for pytrees: leaf names, stacks of arrays of different shapes, and a check for NaN and infinity."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, Shaped


def named_leaves(tree: PyTree, separator: str = "/") -> dict[str, Any]:
    """Return a dict from leaf paths such as "opt_state/0/mu/conv/kernel" to leaves, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=separator): leaf for path, leaf in leaves}


def stack_padded(arrays: Sequence[Array]) -> Shaped[Array, "n ..."]:
    """Return a stack of arrays of the same rank, padded with zeros at the end of each axis to the longest."""
    shape = np.max([array.shape for array in arrays], axis=0)
    missing = [shape - array.shape for array in arrays]
    return jnp.stack([jnp.pad(array, [(0, n) for n in own]) for array, own in zip(arrays, missing, strict=True)])


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Return whether all floating-point arrays in `tree` are free of NaN and infinity."""
    leaves = [jnp.atleast_1d(leaf) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    found = [jnp.any(~jnp.isfinite(leaf), axis=tuple(range(leaf.ndim - 1))) for leaf in leaves]
    # Integers, because XLA would split a reduction of booleans into one for each array again. Only the last axes are
    # summed: a sum over whole arrays is slow on a CPU.
    return jnp.max(jnp.sum(stack_padded(found).astype(jnp.int32), axis=0)) == 0
