import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cifar_flax import models
from cifar_flax.errors import ConfigError
from cifar_flax.models import AirbenchConfig, airbench
from cifar_flax.models.summary import forward_flops


def build(image_shape=(32, 32, 3), platform="cpu", **fields):
    return models.build(AirbenchConfig(**fields), image_shape, 10, platform=platform, rngs=nnx.Rngs(0))


def arrays(model, kind):
    return nnx.to_pure_dict(nnx.state(model, kind))


def run(model, x, seed=None):
    """Return the logits and the updated state; a seed selects training mode."""
    graphdef, state = nnx.split(model)
    keys = None if seed is None else jax.random.split(jax.random.key(seed), len(x))

    def call(state, x):
        model = nnx.merge(graphdef, state)
        return model(x, keys), nnx.state(model)

    return jax.jit(call)(state, x)


def count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(arrays(model, nnx.Param)))


def test_size_equals_that_of_the_paper():
    """Section 3 of the paper: 1.97 million parameters. A training step counts as three forward passes.

    The paper also counts the last row and column of each first convolution of a block, which are not computed: the
    pooling drops them.
    """
    assert count(nnx.eval_shape(build)) == 1_971_352
    dropped = sum(2 * 9 * c_in * c_out * (2 * n - 1) for n, c_in, c_out in [(31, 24, 64), (15, 64, 256), (7, 256, 256)])
    assert 3 * (forward_flops(AirbenchConfig(), (32, 32, 3), 10) + dropped) == pytest.approx(0.71e9, rel=0.005)


def convolutions(jaxpr):
    """Return the heights of the outputs of all convolutions, in order."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            yield equation.outvars[0].aval.shape[1]
        for inner in equation.params.values():
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from convolutions(inner)


@pytest.mark.parametrize(
    ("size", "heights"),
    [(32, [31, 30, 15, 14, 7, 6, 3]), (28, [27, 26, 13, 12, 6, 6, 3]), (24, [23, 22, 11, 10, 5, 4, 2])],
)
def test_convolutions_do_not_compute_the_outputs_that_the_pooling_drops(size, heights):
    x = jnp.zeros((1, size, size, 3))
    program = jax.make_jaxpr(lambda x: build(x.shape[1:], "tpu", widths=(4, 4, 4), global_pool=True)(x))(x)
    assert list(convolutions(program.jaxpr)) == heights


def test_size_of_wider_and_deeper_networks():
    widths = {"widths": (128, 384, 512), "depth": 3, "residual": True}
    model = nnx.eval_shape(lambda: build(**widths))
    convolutions = 9 * (24 * 128 + 2 * 128**2 + 128 * 384 + 2 * 384**2 + 384 * 512 + 2 * 512**2)
    assert count(model) == 24 + convolutions + 3 * (128 + 384 + 512) + 512 * 10


def test_a_residual_adds_the_first_activation():
    """If the later convolutions return zero, the block returns its first activation, activated again."""
    block = build(widths=(4, 4, 4), depth=3, residual=True).blocks[0]
    for conv in block.convs[1:]:
        conv.kernel[...] = jnp.zeros(conv.kernel.shape)
    graphdef, state = nnx.split(block)
    first = jax.jit(lambda state, x: airbench.gelu(nnx.merge(graphdef, state).convs[0](x)))
    x = jax.random.normal(jax.random.key(0), (2, 7, 7, 24))
    out = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, False))(state, x)
    np.testing.assert_allclose(out, airbench.gelu(first(state, x)), rtol=1e-4, atol=1e-5)


def test_initial_values():
    params = arrays(build(), nnx.Param)
    kernel = np.asarray(params["blocks"][1]["convs"][0]["kernel"])
    assert kernel.shape == (3, 3, 64, 256)
    # The first filters are the identity: each passes one input channel through (dirac initialization).
    identity = np.zeros((3, 3, 64, 64))
    identity[1, 1] = np.eye(64)
    np.testing.assert_array_equal(kernel[..., :64], identity)
    others, limit = kernel[..., 64:], 1 / np.sqrt(9 * 64)
    assert np.abs(others).max() <= limit
    np.testing.assert_allclose(others.std(), limit / np.sqrt(3), rtol=0.02)
    np.testing.assert_allclose(np.std(params["head"]["kernel"], ddof=1), 1, rtol=1e-5)
    bias = np.abs(params["whitening"]["bias"])
    assert 0.2 < bias.max() <= 1 / np.sqrt(12)


def test_initialization_for_sgd():
    """Logits divided by 9, PyTorch's default initialization of the head, and a whitening bias of zero."""
    muon, sgd = build(widths=(4, 4, 100)), build(widths=(4, 4, 100), init="sgd")
    assert float(jnp.std(sgd.head.kernel[...])) == pytest.approx(1 / np.sqrt(3 * 100), rel=0.05)
    assert not np.any(sgd.whitening.bias[...])
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    for model in (muon, sgd):
        model.fit(x)
    sgd.head.kernel[...], sgd.whitening.bias[...] = muon.head.kernel[...], muon.whitening.bias[...]
    for ours, theirs in zip(muon.blocks, sgd.blocks, strict=True):
        for conv, other in zip(ours.convs, theirs.convs, strict=True):
            other.kernel[...] = conv.kernel[...]
    np.testing.assert_allclose(run(sgd, x)[0], run(muon, x)[0] * 100 / 9, rtol=1e-4)


def test_whitening_makes_patches_white():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(3, 3))
    images = jnp.asarray(rng.normal(size=(200, 9, 9, 3)) @ mixing, jnp.float32)
    model = build(image_shape=(32, 32, 3))
    model.fit(images)
    assert "kernel" not in arrays(model, nnx.Param)["whitening"]  # not trained
    model.whitening.bias[...] = jnp.zeros(24)
    out = np.asarray(jax.jit(lambda x: model.whitening(x))(images)).reshape(-1, 24)
    np.testing.assert_allclose(out[:, 12:], -out[:, :12], atol=1e-4)
    covariance = out[:, :12].T @ out[:, :12] / len(out)
    np.testing.assert_allclose(covariance, np.eye(12), atol=0.01)


def test_whitening_keeps_directions_without_content_small():
    """The term added to the eigenvalues keeps the noise of a constant channel from being scaled to std 1."""
    images = jnp.asarray(np.random.default_rng(0).normal(size=(50, 8, 8, 3)), jnp.float32).at[..., 2].set(0)
    kernel = np.asarray(airbench.whitening_kernel(images)).reshape(12, 24)
    assert np.linalg.norm(kernel, axis=0).max() == pytest.approx(1 / np.sqrt(5e-4), rel=1e-3)


@pytest.mark.parametrize(
    ("platform", "shape"),
    [
        pytest.param("cuda", (32, 32, 3), marks=pytest.mark.slow),
        ("tpu", (20, 24, 3)),
        pytest.param("cuda", (28, 32, 3), marks=pytest.mark.slow),
        pytest.param("tpu", (28, 32, 3), marks=pytest.mark.slow),
        pytest.param("cpu", (32, 32, 3), marks=pytest.mark.slow),
        pytest.param("cpu", (28, 32, 3), marks=pytest.mark.slow),
        pytest.param("cpu", (20, 24, 3), marks=pytest.mark.slow),
    ],
)
def test_network_follows_the_paper(platform, shape):
    """Compare logits and gradients with those of the layers written as XLA operations."""
    global_pool = shape != (32, 32, 3)
    model = build(shape, platform, widths=(5, 6, 7), global_pool=global_pool)
    x, weight = jax.random.normal(jax.random.key(0), (4, *shape)), jax.random.normal(jax.random.key(1), (4, 10))
    model.fit(x)
    graphdef, params, stats = nnx.graphdef(model), arrays(model, nnx.Param), arrays(model, nnx.BatchStat)

    def conv(x, kernel, padding):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def pool(x, n):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, n, n, 1), (1, n, n, 1), "VALID")

    def norm(x, bias):
        mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
        return (x - mean) / jnp.sqrt(var + 1e-12) + bias[None, None, None]

    def activation(x):
        return jax.nn.gelu(x, approximate=False)

    def of_the_paper(p, x):
        y = activation(conv(x, stats["whitening"]["kernel"], "VALID") + p["whitening"]["bias"][None, None, None])
        for number in range(3):
            block = p["blocks"][number]
            y = pool(conv(y, block["convs"][0]["kernel"], "SAME"), 2)
            y = activation(norm(y, block["norms"][0]["norm"]["bias"]))
            y = activation(norm(conv(y, block["convs"][1]["kernel"], "SAME"), block["norms"][1]["norm"]["bias"]))
        y = y.max((1, 2)) if global_pool else pool(y, 3).reshape(4, 7)
        return y @ p["head"]["kernel"] / 7

    def ours(p, x):
        return nnx.merge(graphdef, p, stats)(x, jax.random.split(jax.random.key(2), 4))

    def value_and_gradients(network):
        def loss(params, x):
            logits = network(params, x)
            return jnp.sum(weight * logits), logits

        gradients, logits = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        return [logits, *jax.tree.leaves(gradients)]

    for found, expected in zip(value_and_gradients(ours), value_and_gradients(of_the_paper), strict=True):
        assert found.shape == expected.shape
        # Rounding errors may exchange almost equal elements of a pooling window.
        assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize(("fields", "decay"), [({}, 0.6), ({"norm_decay": 0.9}, 0.9)])
def test_batch_statistics_decay(fields, decay):
    model = build(widths=(4, 4, 4), **fields)
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    model.fit(x)
    first = jax.jit(lambda x: model.blocks[0].convs[0](airbench.gelu(model.whitening(x))))(x)
    stats = nnx.to_pure_dict(run(model, x, seed=1)[1])["blocks"][0]["norms"][0]["norm"]
    np.testing.assert_allclose(stats["mean"], (1 - decay) * first.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(stats["var"], decay + (1 - decay) * first.var((0, 1, 2)), rtol=1e-3)


def test_platforms_compute_the_same_network():
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    outputs = []
    for platform in ("cpu", "cuda"):
        model = build(widths=(8, 8, 8), platform=platform)
        model.fit(x)
        outputs.append(run(model, x, seed=1)[0])
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-4)


def test_gradient_does_not_depend_on_the_optimizations_of_the_compiler(request):
    """Without optimizations, XLA may compute the input of a max-pool twice, with different roundings."""
    model = build(platform="cuda", widths=(8, 16, 16))
    images = jax.random.normal(jax.random.key(0), (64, 32, 32, 3))
    model.fit(images)
    graphdef, state = nnx.graphdef(model), [arrays(model, kind) for kind in (nnx.Param, nnx.BatchStat)]
    weight, keys = jax.random.normal(jax.random.key(1), (64, 10)), jax.random.split(jax.random.key(2), 64)

    def gradient(disabled):
        def loss(params):
            return jnp.sum(weight * nnx.merge(graphdef, params, state[1])(images, keys))

        jax.config.update("jax_disable_most_optimizations", disabled)
        return np.concatenate([x.ravel() for x in jax.tree.leaves(jax.jit(jax.grad(loss))(state[0]))])

    default = request.config.getoption("--default-optimizations")
    request.addfinalizer(lambda: jax.config.update("jax_disable_most_optimizations", not default))
    found, expected = gradient(True), gradient(False)
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_applies_to_activations_only(dtype):
    model = build(dtype=dtype, widths=(4, 4, 4))
    model.fit(jnp.ones((1, 32, 32, 3)))
    logits, state = jax.eval_shape(functools.partial(run, model, seed=1), jnp.ones((2, 32, 32, 3)))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.blocks[0].convs[0], jnp.zeros((1, 15, 15, 24))).dtype == dtype


def test_global_pool_makes_the_parameters_independent_of_the_image_size():
    assert count(nnx.eval_shape(lambda: build((256, 256, 3), global_pool=True))) == 1_971_352  # as of 32x32 images
    x = jax.random.normal(jax.random.key(0), (2, 40, 24, 3))
    model = build(x.shape[1:], widths=(5, 6, 7), global_pool=True)
    model.fit(x)
    features = jax.jit(
        lambda x: functools.reduce(lambda y, block: block(y, False), model.blocks, airbench.gelu(model.whitening(x)))
    )
    y = features(x)
    assert y.shape == (2, 4, 2, 7)
    np.testing.assert_allclose(run(model, x)[0], y.max(axis=(1, 2)) @ model.head.kernel[...] / 7, rtol=1e-3, atol=1e-4)


def test_global_pool_on_images_of_32_pixels_is_the_3x3_pool():
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    outputs = []
    for global_pool in (False, True):
        model = build(widths=(4, 4, 4), global_pool=global_pool)
        model.fit(x)
        outputs.append(run(model, x)[0])
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("global_pool", [False, True])
def test_one_pixel_less_is_refused(global_pool):
    least = 9 if global_pool else 25
    build((least, least, 3), global_pool=global_pool, widths=(4, 4, 4))
    with pytest.raises(ConfigError, match=f"must be at least {least}"):
        build((least, least - 1, 3), global_pool=global_pool)


def test_small_images_are_refused():
    with pytest.raises(ConfigError, match=r"model\.name='airbench': .*24x32.*25"):
        build(image_shape=(24, 32, 3))


@pytest.mark.parametrize(
    ("field", "value"),
    [("widths", (0, 1, 1)), ("depth", 4), ("dtype", "float64"), ("norm_decay", 1.0), ("init", "adam")],
    ids=lambda value: str(value),
)
def test_invalid_settings_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"^model.{field}="):
        AirbenchConfig(**{field: value}).validate()
