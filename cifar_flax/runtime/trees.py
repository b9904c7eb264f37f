"""Pytrees of arrays: names of their leaves, and whether they are finite."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree


def named_leaves(tree: PyTree, separator: str = "/") -> dict[str, Any]:
    """Return path -> leaf, such as "opt_state/0/mu/conv/kernel", in the order of the tree's leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=separator): leaf for path, leaf in leaves}


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Return whether no floating-point array in `tree` has an infinity or a NaN."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
