"""The convolutions of each platform, compared with XLA's plain operations: values and both gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cifar_flax.models import layers
from cifar_flax.models.flops import matrix_flops
from cifar_flax.runtime import compilation


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain(x, kernel, *, padding, stride=1, pool=False):
    y = lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") if pool else y


def value_and_gradients(convolution, x, kernel):
    def run(x, kernel):
        y, transpose = jax.vjp(convolution, x, kernel)
        return y, *transpose(jnp.asarray(normal(2, *y.shape), y.dtype))

    return jax.jit(run, compiler_options=compilation.options("cpu"))(x, kernel)


def assert_equal(x_shape, kernel_shape, platform="cpu", dtype=jnp.float32, tolerance=3e-5, **options):
    x, kernel = jnp.asarray(normal(0, *x_shape), dtype), jnp.asarray(normal(1, *kernel_shape), dtype)
    ours = value_and_gradients(functools.partial(layers.conv2d, platform=platform, **options), x, kernel)
    xla = value_and_gradients(functools.partial(plain, **options), x.astype(jnp.float32), kernel.astype(jnp.float32))
    for a, b in zip(ours, xla, strict=True):
        assert (a.shape, a.dtype) == (b.shape, dtype)
        atol = tolerance * max(1e-6, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=atol, rtol=0)


# Sizes of the networks' layers, sizes close to the tile of 4, and sizes that are not square.
SIZES = [(31, 31), (15, 15), (7, 7), (3, 3), (1, 1), (2, 2), (8, 5), (6, 9), (13, 4), (5, 13)]


@pytest.mark.parametrize("size", SIZES)
def test_3x3_convolution_equals_xla(size):
    assert_equal((2, *size, 24), (3, 3, 24, 6), padding="SAME")


@pytest.mark.parametrize("size", SIZES)
def test_3x3_convolution_with_max_pool_equals_xla(size):
    assert_equal((2, *size, 5), (3, 3, 5, 8), padding="SAME", pool=True)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_convolution_with_max_pool_of_accelerators_equals_xla(platform, padding):
    for size in ((7, 6), (6, 9), (3, 5)):
        assert_equal((2, *size, 5), (3, 3, 5, 8), platform, padding=padding, pool=True)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_convolution_with_max_pool_and_stride_equals_xla(padding):
    for kernel_size in (1, 3):
        assert_equal((2, 9, 13, 6), (kernel_size, kernel_size, 6, 4), padding=padding, stride=2, pool=True)


@pytest.mark.parametrize(
    ("platform", "padding", "c_in"), [("cpu", "SAME", 8), ("cpu", "VALID", 3), ("cpu", "VALID", 8), ("tpu", "VALID", 8)]
)
def test_an_odd_size_takes_the_operations_of_the_even_size_below(platform, padding, c_in):
    """The pooling drops the last row and column, so neither the output nor the gradient of the kernel computes them."""

    def operations(size):
        def run(x, kernel):
            options = {"padding": padding, "pool": True, "platform": platform}
            y, transpose = jax.vjp(functools.partial(layers.conv2d, **options), x, kernel)
            return y, transpose(y)[1]

        return matrix_flops(jax.make_jaxpr(run)(jnp.zeros((2, size, size, c_in)), jnp.zeros((3, 3, c_in, 4))))

    assert operations(5) == operations(4) < operations(13) == operations(12)


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (3, 7, 9, 1), (2, 4, 5, 4), (2, 3, 3, 1)])
def test_patches_with_max_pool_equal_xla(shape):
    assert_equal(shape, (3, 3, shape[-1], 6), padding="VALID", pool=True)


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (3, 7, 5, 1), (1, 2, 2, 4)])
def test_patches_equal_xla(shape):
    assert_equal(shape, (2, 2, shape[-1], 6), padding="VALID")


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("size", [(10, 10), (9, 6), (3, 3)])
def test_strided_patches_equal_xla(size, kernel_size):
    """Few input channels make short patches, more make long ones."""
    for c_in in (3, 6):
        assert_equal((2, *size, c_in), (kernel_size, kernel_size, c_in, 4), padding="VALID", stride=2)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_other_shapes_use_the_convolution_of_xla(padding):
    assert_equal((2, 9, 9, 6), (5, 5, 6, 4), padding=padding)
    assert_equal((2, 9, 9, 6), (5, 5, 6, 4), padding=padding, pool=True)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(("padding", "c_in"), [("SAME", 8), ("VALID", 3)])
def test_each_platform_uses_its_own_convolution(pool, padding, c_in):
    def text(platform):
        run = jax.jit(functools.partial(layers.conv2d, padding=padding, pool=pool, platform=platform))
        return run.lower(jnp.zeros((2, 8, 8, c_in)), jnp.zeros((3, 3, c_in, 4))).as_text()

    assert "stablehlo.convolution" not in text("cpu")
    assert "stablehlo.dot_general" in text("cpu")
    for platform in ("cuda", "tpu"):
        assert "stablehlo.convolution" in text(platform)
        assert "stablehlo.dot_general" not in text(platform)


def test_bfloat16_convolutions_are_not_transformed():
    """The transforms would lose most of the eight bits of precision."""
    run = jax.jit(lambda x, kernel: layers.conv2d(x, kernel, padding="SAME", platform="cpu"))
    text = run.lower(jnp.zeros((2, 8, 8, 8), jnp.bfloat16), jnp.zeros((3, 3, 8, 4), jnp.bfloat16)).as_text()
    assert "stablehlo.convolution" in text
