"""Utilities for pytrees: leaf names and a check for NaN and infinity."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree


def named_leaves(tree: PyTree, separator: str = "/") -> dict[str, Any]:
    """Return a dict from leaf paths such as "opt_state/0/mu/conv/kernel" to leaves, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=separator): leaf for path, leaf in leaves}


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Return whether all floating-point arrays in `tree` are free of NaN and infinity."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
