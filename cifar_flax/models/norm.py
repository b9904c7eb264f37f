"""Batch normalization that reads and writes activations only in the dtype in which they are stored.

Source: Ioffe and Szegedy 2015, "Batch Normalization" (arXiv:1502.03167), section 3.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


def identity(x: Array) -> Array:
    """Return `x`."""
    return x


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` over all axes but the last, together with the addition and the activation that follow it.

    It computes in float32 and returns the dtype of `x`. For the gradient, it saves its inputs and a mean and a variance
    per channel, and recomputes everything else. Forward-mode differentiation (`jax.jvp`) is not supported.
    """

    def __init__(self, channels: int, *, platform: str, **settings: Any):
        super().__init__(channels, **settings)
        self.platform = platform

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "batch *places c"],
        *,
        use_running_average: bool,
        shortcut: Float[Array, "batch *places c"] | None = None,
        activation: Callable[[Array], Array] = identity,
    ) -> Float[Array, "batch *places c"]:
        """Return `activation(normalized x + shortcut)`; unless `use_running_average`, update the running averages.

        Without `use_running_average`, mean and variance are those of the batch, on all devices if `axis_name` is set.
        """
        scale, bias = (None if variable is None else variable[...] for variable in (self.scale, self.bias))
        terms = _Terms(scale, bias, shortcut)
        layer = _Layer(self.epsilon, activation, self.axis_name, self.platform)
        if use_running_average:
            return _apply(layer, x, _Moments(self.mean[...], self.var[...]), terms)
        out, batch = _normalize(layer, x, terms)
        self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * batch.mean
        self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * batch.var
        return out


class _Layer(NamedTuple):
    """The settings of a layer."""

    epsilon: float
    activation: Callable[[Array], Array]
    axis_name: str | None
    platform: str


class _Moments(NamedTuple):
    mean: Float[Array, " c"]
    var: Float[Array, " c"]  # biased: divided by the number of elements


class _Terms(NamedTuple):
    """The arrays that the normalized input is multiplied with and that are added to it, if they exist."""

    scale: Float[Array, " c"] | None
    bias: Float[Array, " c"] | None
    shortcut: Float[Array, "batch *places c"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(layer: _Layer, x: Array, terms: _Terms) -> tuple[Array, _Moments]:
    """Return the output of the layer, and the moments of the batch, whose gradient is ignored."""
    moments = _moments(layer, x)
    return _apply(layer, x, moments, terms), moments


def _forward(layer: _Layer, x: Array, terms: _Terms) -> tuple[tuple[Array, _Moments], tuple[Array, _Moments, _Terms]]:
    out, moments = _normalize(layer, x, terms)
    return (out, moments), (x, moments, terms)


def _backward(
    layer: _Layer, saved: tuple[Array, _Moments, _Terms], gradient: tuple[Array, _Moments]
) -> tuple[Array, _Terms]:
    x, moments, terms = saved
    centered = _centered(layer, x, moments)
    _, transpose = jax.vjp(layer.activation, _add_terms(centered, terms))
    (dy,) = transpose(gradient[0].astype(jnp.float32))
    own = means = _means(layer, dy, dy * centered)
    if layer.axis_name is not None:
        means = lax.pmean(own, layer.axis_name)
    if layer.platform == "tpu":
        # A TPU reads this faster than it computes the gradient of the activation again.
        dy = lax.optimization_barrier(dy.astype(x.dtype)).astype(jnp.float32)
    factor = lax.rsqrt(moments.var + layer.epsilon)
    factor = factor if terms.scale is None else factor * terms.scale
    dx = (dy - _spread(means[0], x) - centered * _spread(means[1], x)) * _spread(factor, x)
    # Parameters get the gradient of this device's copy; the training step averages over the devices.
    count = math.prod(x.shape[:-1])
    return dx.astype(x.dtype), _Terms(
        scale=None if terms.scale is None else own[1] * count,
        bias=None if terms.bias is None else own[0] * count,
        shortcut=None if terms.shortcut is None else dy.astype(terms.shortcut.dtype),
    )


_normalize.defvjp(_forward, _backward)


def _apply(layer: _Layer, x: Array, moments: _Moments, terms: _Terms) -> Array:
    return layer.activation(_add_terms(_centered(layer, x, moments), terms)).astype(x.dtype)


def _centered(layer: _Layer, x: Array, moments: _Moments) -> Float[Array, "batch *places c"]:
    factor = lax.rsqrt(moments.var + layer.epsilon)
    return (x.astype(jnp.float32) - _spread(moments.mean, x)) * _spread(factor, x)


def _add_terms(x: Array, terms: _Terms) -> Array:
    x = x if terms.scale is None else x * _spread(terms.scale, x)
    x = x if terms.bias is None else x + _spread(terms.bias, x)
    return x if terms.shortcut is None else x + terms.shortcut.astype(jnp.float32)


def _spread(vector: Float[Array, " c"], x: Array) -> Float[Array, "*ones c"]:
    """Return `vector` in a shape that broadcasts to that of `x`."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


def _moments(layer: _Layer, x: Array) -> _Moments:
    """Return the moments over all axes but the last, and over the devices of `axis_name`.

    E[x^2] - E[x]^2 cancels if the mean is large compared to the standard deviation. Subtracting one element of the
    batch, the pivot, from all n elements first limits the cancellation: the squared distance of an element to the mean
    is typically about as large as the variance, and at most n times the variance (if all other elements are equal).
    """
    pivot = x[(0, *(size // 2 for size in x.shape[1:-1]))].astype(jnp.float32)
    shifted = x.astype(jnp.float32) - _spread(pivot, x)
    offset, square = _means(layer, shifted, shifted * shifted)
    moments = _Moments(pivot + offset, jnp.maximum(square - offset * offset, 0))
    return moments if layer.axis_name is None else _combine(moments, layer.axis_name)


def _combine(moments: _Moments, axis_name: str) -> _Moments:
    """Return the moments of all devices' elements, with one all-reduce (Chan et al. 1979, equation 2.1)."""
    # psum with zeros is exact, and shard_map infers that its result is equal on all devices, unlike that of all_gather.
    devices = jnp.zeros((lax.axis_size(axis_name), 2, moments.mean.size), jnp.float32)
    own = lax.dynamic_update_index_in_dim(devices, jnp.stack(moments), lax.axis_index(axis_name), axis=0)
    devices = lax.psum(own, axis_name)
    means, variances = devices[:, 0], devices[:, 1]
    mean = jnp.mean(means, axis=0)
    return _Moments(mean, jnp.mean(variances + (means - mean[None]) ** 2, axis=0))


def _means(layer: _Layer, a: Array, b: Array) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Return the means of `a` and `b` over all axes but the last."""
    axes, factor = tuple(range(a.ndim - 1)), 1 / math.prod(a.shape[:-1])
    if layer.platform in ("cpu", "tpu"):
        return jnp.sum(a, axes) * factor, jnp.sum(b, axes) * factor

    def add(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] + second[0], first[1] + second[1]

    # On a GPU, one reduction of both, and a factor inside of it, take fewer kernels. On a CPU, this reduction is three
    # times slower than two; on a TPU, it is not fused with the convolution before it.
    zero = jnp.zeros((), jnp.float32)
    return lax.reduce((a * factor, b * factor), (zero, zero), add, axes)
