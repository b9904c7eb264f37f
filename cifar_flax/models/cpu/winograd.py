"""3x3 convolutions by Winograd's minimal filtering, F(4x4, 3x3): a quarter of the multiplications.

A tile of 6x6 inputs yields 4x4 outputs. Input tiles and kernel are transformed by small constant matrices; each of the
36 transformed positions then takes one matrix product over channels, the operation that XLA does best on a CPU; a third
matrix transforms the products to outputs. The gradients are the transposes of these steps. Rounding errors are about
ten times those of direct convolution.

Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308), sections 4.1 and
4.3. The matrices are those of the Toom-Cook algorithm for the points 0, 1, -1, 2, -2 and infinity.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import optimization_barrier
from jaxtyping import Array, Float, Shaped

from cifar_flax.models.cpu.pooling import first_max

_TILE = 4  # outputs per tile along each axis
_INPUT = np.array(  # 6 transformed positions from 6 inputs
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_KERNEL = np.array(  # 6 transformed positions from 3 weights
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
) / np.array(24)
_OUTPUT = np.array(  # 4 outputs from 6 transformed positions
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)


class _Saved(NamedTuple):
    """Values of the forward pass that the gradients need."""

    x: Float[Array, "batch height width c_in"]  # only its shape is used
    tiles: Float[Array, "6 6 n c_in"]
    weights: Float[Array, "6 6 c_in c_out"]


@jax.custom_vjp
def conv3x3(
    x: Float[Array, "batch height width c_in"], kernel: Float[Array, "3 3 c_in c_out"]
) -> Float[Array, "batch height width c_out"]:
    """Return the convolution with stride 1 and a zero padding of 1, which keeps height and width."""
    return _conv_forward(x, kernel)[0]


def _conv_forward(x: Array, kernel: Array) -> tuple[Array, _Saved]:
    products, saved = _products(x, kernel, *x.shape[1:3])
    return _interleave(_both_axes(_OUTPUT, products))[:, : x.shape[1], : x.shape[2]], saved


def _conv_backward(saved: _Saved, dy: Array) -> tuple[Array, Array]:
    batch, height, width, c = dy.shape
    rows, columns = _tiles(height), _tiles(width)
    dy = jnp.pad(dy, ((0, 0), (0, rows * _TILE - height), (0, columns * _TILE - width), (0, 0)))
    dy = optimization_barrier(dy).reshape(batch, rows, _TILE, columns, _TILE, c).transpose(2, 4, 0, 1, 3, 5)
    return _gradients(saved, _both_axes(_OUTPUT.T, optimization_barrier(dy)))


conv3x3.defvjp(_conv_forward, _conv_backward)


@jax.custom_vjp
def conv3x3_max_pool(
    x: Float[Array, "batch height width c_in"], kernel: Float[Array, "3 3 c_in c_out"]
) -> Float[Array, "batch h_out w_out c_out"]:
    """Return `conv3x3`, followed by a 2x2 max-pool.

    A tile holds four pooling windows, so the output of the convolution is never assembled. Tiles cover only the outputs
    that the pooling keeps: it drops an odd last row or column.
    """
    return _pool_forward(x, kernel)[0]


def _pool_forward(x: Array, kernel: Array) -> tuple[Array, tuple[_Saved, Array]]:
    h_out, w_out = x.shape[1] // 2, x.shape[2] // 2
    products, saved = _products(x, kernel, 2 * h_out, 2 * w_out)
    y = _both_axes(_OUTPUT, products)
    squares = [first_max([*y[i, j : j + 2], *y[i + 1, j : j + 2]]) for i in (0, 2) for j in (0, 2)]
    largest, winner = (jnp.stack(parts).reshape(2, 2, *parts[0].shape) for parts in zip(*squares, strict=True))
    return _interleave(largest)[:, :h_out, :w_out], (saved, winner)


def _pool_backward(residuals: tuple[_Saved, Array], dy: Array) -> tuple[Array, Array]:
    saved, winner = residuals
    rows, columns = winner.shape[3:5]
    more_rows, more_columns = 2 * rows - dy.shape[1], 2 * columns - dy.shape[2]
    dy = optimization_barrier(jnp.pad(dy, ((0, 0), (0, more_rows), (0, more_columns), (0, 0))))
    tile: list[Array] = []  # the 16 positions of each tile, row by row
    for i in (0, 1):
        left, right = ([jnp.where(winner[i, j] == place, dy[:, i::2, j::2], 0) for place in range(4)] for j in (0, 1))
        tile += [*left[:2], *right[:2], *left[2:], *right[2:]]
    return _gradients(saved, _both_axes(_OUTPUT.T, _stack(tile).reshape(_TILE, _TILE, *tile[0].shape)))


conv3x3_max_pool.defvjp(_pool_forward, _pool_backward)


def _tiles(length: int) -> int:
    """Return the number of tiles that cover `length` outputs: one tile even if there is none, as slices need."""
    return max(1, -(-length // _TILE))


def _products(
    x: Array, kernel: Array, h_out: int, w_out: int
) -> tuple[Float[Array, "6 6 batch rows columns c_out"], _Saved]:
    """Return the products of the tiles that cover the first `h_out` x `w_out` outputs."""
    batch, height, width, _ = x.shape
    rows, columns = _tiles(h_out), _tiles(w_out)
    below, right = rows * _TILE + 1 - height, columns * _TILE + 1 - width
    padded = optimization_barrier(jnp.pad(x, ((0, 0), (1, below), (1, right), (0, 0))))
    saved = _Saved(x, _split(padded, rows, columns), _transform_kernel(kernel, _KERNEL))
    products = jnp.einsum("uvnc,uvcd->uvnd", saved.tiles, saved.weights)
    return products.reshape(6, 6, batch, rows, columns, -1), saved


def _gradients(saved: _Saved, d_products: Float[Array, "6 6 batch rows columns c_out"]) -> tuple[Array, Array]:
    batch, height, width, c_in = saved.x.shape
    rows, columns = d_products.shape[3:5]
    d_products = d_products.reshape(6, 6, -1, d_products.shape[-1])
    d_weights = jnp.einsum("uvnc,uvnd->uvcd", saved.tiles, d_products)
    # Transpose first: products with a matrix that is transposed on the fly take twice as long.
    weights = optimization_barrier(saved.weights.transpose(0, 1, 3, 2))
    d_tiles = jnp.einsum("uvnd,uvdc->uvnc", d_products, weights)
    dx = _join(_both_axes(_INPUT.T, d_tiles.reshape(6, 6, batch, rows, columns, c_in)))
    return dx[:, 1 : height + 1, 1 : width + 1], _transform_kernel(d_weights, _KERNEL.T)


def _both_axes(
    matrix: Shaped[np.ndarray, "k_out k"], x: Float[Array, "k k batch rows columns c"]
) -> Float[Array, "k_out k_out batch rows columns c"]:
    """Transform each tile along both axes at once, by multiplying with the Kronecker product of the matrices.

    This takes more multiplications than one axis after the other, but reads and writes memory only once.
    """
    k_out, k = matrix.shape
    both = jnp.asarray(np.kron(matrix, matrix), x.dtype)
    return (both @ x.reshape(k * k, -1)).reshape(k_out, k_out, *x.shape[2:])


def _combine(matrix: np.ndarray, terms: Array | Iterable[Array]) -> list[Array]:
    """Return `matrix` times the vector of `terms`, written out because most elements are 0, 1 or -1."""
    terms = list(terms)

    def row(factors: list[float]) -> Array:
        first, *rest = [term if f == 1 else f * term for f, term in zip(factors, terms, strict=True) if f]
        return sum(rest, first)

    return [row(factors) for factors in matrix.tolist()]


def _stack(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Stack arrays and write the result to memory. XLA would otherwise recompute each element at every use."""
    return optimization_barrier(jnp.stack(arrays, axis))


def _split(x: Float[Array, "batch padded_height padded_width c"], rows: int, columns: int) -> Float[Array, "6 6 n c"]:
    """Return the transformed 6x6 input tiles, one every 4 positions: transform the height, then the width."""
    x = _stack(_combine(_INPUT, [x[:, i : i + _TILE * (rows - 1) + 1 : _TILE] for i in range(6)]))
    x = _stack(_combine(_INPUT, [x[:, :, :, j : j + _TILE * (columns - 1) + 1 : _TILE] for j in range(6)]), axis=1)
    return x.reshape(6, 6, -1, x.shape[-1])


def _join(x: Float[Array, "6 6 batch rows columns c"]) -> Float[Array, "batch padded_height padded_width c"]:
    """Add overlapping tiles into an image: the transpose of cutting an image into tiles."""
    x = _overlap(x.transpose(2, 3, 0, 4, 1, 5), 3)
    x = _overlap(x.reshape(*x.shape[:3], -1, x.shape[-1]), 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _overlap(x: Array, axis: int) -> Array:
    """Add positions 4 and 5 of each tile to positions 0 and 1 of the next."""
    own = jax.lax.slice_in_dim(x, 0, _TILE, axis=axis + 1)
    over = jax.lax.slice_in_dim(x, _TILE, 6, axis=axis + 1)
    pad_own, pad_over = ([(0, 0)] * x.ndim for _ in range(2))
    pad_own[axis], pad_over[axis], pad_over[axis + 1] = (0, 1), (1, 0), (0, 2 * _TILE - 6)
    return jnp.pad(own, pad_own) + jnp.pad(over, pad_over)


def _interleave(x: Float[Array, "k k batch rows columns c"]) -> Float[Array, "batch height width c"]:
    """Assemble an image from the k x k positions of each tile."""
    k, _, batch, rows, columns, c = x.shape
    return optimization_barrier(x.transpose(2, 3, 0, 4, 1, 5)).reshape(batch, rows * k, columns * k, c)


def _transform_kernel(kernel: Array, matrix: np.ndarray) -> Array:
    kernel = jnp.stack(_combine(matrix, kernel))
    return jnp.stack(_combine(matrix, [kernel[:, j] for j in range(kernel.shape[1])]), axis=1)
