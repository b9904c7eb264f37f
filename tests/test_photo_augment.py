"""TrivialAugment, color jitter, random resized crops, mixup and CutMix: their definitions and their random numbers."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from cifar_flax.data import augment as augmentation
from cifar_flax.data.augment import AugmentConfig, Examples
from cifar_flax.data.augment.base import Context
from cifar_flax.data.augment.trivial_augment import OPERATIONS, transform

BATCH = 1000
KEYS = jax.random.split(jax.random.key(3), BATCH)
EVERYTHING = AugmentConfig(
    flip="random", random_resized_crop=0.3, trivial_augment=True, color_jitter=0.4, cutout=4, mixup=0.5, cutmix=1.0
)  # fmt: skip


def make_context(config, keys, next_row=lambda rows: jnp.roll(rows, -1, axis=0)):
    epoch = jnp.zeros(len(keys), jnp.int32)
    return Context(
        config=config, platform="tpu", epoch=epoch, epoch_keys=keys, first_epoch_keys=keys, next_row=next_row
    )  # fmt: skip


def make_images(count, shape, seed=0):
    """Return random images, of which every third has little contrast."""
    images = np.random.default_rng(seed).integers(20, 200, (count, *shape))
    images[::3] = images[::3] // 4 + 100
    return images.astype(np.uint8)


def apply(function, image, config, target=None):
    """Return the images and targets of `function`, compiled, for `BATCH` examples."""
    step = jax.jit(lambda image, keys: function(Examples(image, target), make_context(config, keys)))
    return jax.device_get(step(image, KEYS))


def assert_mean(values, expected):
    values = np.asarray(values, np.float64)
    np.testing.assert_allclose(values.mean(axis=0), expected, atol=5 * values.std() / np.sqrt(len(values)))


def rotated_source(shape, degrees):
    """Return the row and the column in the image of the center of each pixel of the rotated image."""
    y, x = np.indices(shape[:2]) + 0.5
    v, u, angle = y - shape[0] / 2, x - shape[1] / 2, np.radians(degrees)
    return np.cos(angle) * v + np.sin(angle) * u + shape[0] / 2, np.cos(angle) * u - np.sin(angle) * v + shape[1] / 2


def pillow(image, name, level, sign):
    """Return the result of an operation with Pillow, with the strengths of the paper's wide space."""
    factor, shear, pixels = 0.01 + 1.99 * level / 30, sign * 0.99 * level / 30, sign * (32 * level // 30)
    image = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    affine = functools.partial(image.transform, image.size, Image.Transform.AFFINE)
    operations = {
        "identity": lambda: image,
        "rotate": lambda: image.rotate(sign * (135 * level // 30)),
        "shear_x": lambda: affine((1, shear, 0, 0, 1, 0)),
        "shear_y": lambda: affine((1, 0, 0, shear, 1, 0)),
        "translate_x": lambda: affine((1, 0, pixels, 0, 1, 0)),
        "translate_y": lambda: affine((1, 0, 0, 0, 1, pixels)),
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "solarize": lambda: ImageOps.solarize(image, 256 - 256 * level // 30),
        "posterize": lambda: ImageOps.posterize(image, 8 - 6 * level // 30),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
    }
    assert tuple(operations) == OPERATIONS
    return np.asarray(operations[name]()).reshape(image.height, image.width, -1)


@pytest.mark.parametrize("shape", [(26, 27, 3), (26, 27, 1)])
def test_trivial_augment_is_an_operation_of_pillow(shape):
    """Some may differ by one gray level, because Pillow cuts fractions off instead of rounding."""
    choices = np.array(list(itertools.product(range(14), range(31), (-1, 1))))
    images = make_images(len(choices), shape)
    found = np.asarray(jax.jit(transform)(images, *choices.T))
    assert found.dtype == np.uint8
    rounded = {"auto_contrast", "brightness", "contrast", "color", "sharpness"}
    for image, out, (operation, level, sign) in zip(images, found.astype(int), choices.tolist(), strict=True):
        name = OPERATIONS[operation]
        difference = np.abs(out - pillow(image, name, level, sign))
        if name == "rotate":  # without the pixels whose centers come from the edge between two pixels
            sources = np.stack(rotated_source(shape, sign * (135 * level // 30)))
            difference[np.any(np.abs(sources - np.round(sources)) < 0.01, axis=0)] = 0
        assert difference.max() <= (name in rounded), name


def test_trivial_augment_draws_each_operation_strength_and_sign_equally_often(monkeypatch):
    drawn = []
    module = sys.modules[transform.__module__]  # the package's attribute of this name is the function
    monkeypatch.setattr(module, "transform", lambda image, *values: drawn.extend(values) or image)
    context = make_context(AugmentConfig(trivial_augment=True), KEYS)
    augmentation.trivial_augment(Examples(jnp.zeros((BATCH, 8, 8, 3), jnp.uint8), None), context)
    for values, possible in zip(drawn, (range(14), range(31), (-1, 1)), strict=True):
        counts = np.array([np.sum(np.asarray(values) == value) for value in possible])
        assert counts.sum() == BATCH
        assert np.all(np.abs(counts - BATCH / len(possible)) < 5 * np.sqrt(BATCH / len(possible)))
    assert np.all(np.abs(np.corrcoef(np.stack(drawn)) - np.eye(3)) < 5 / np.sqrt(BATCH))


def test_color_jitter_scales_brightness_contrast_and_saturation():
    """Two gray halves reveal brightness and contrast, a uniform color the product of all factors."""
    config = AugmentConfig(color_jitter=0.3)
    halves = np.full((BATCH, 8, 8, 3), 60, np.uint8)
    halves[:, :, 4:] = 100
    color = np.broadcast_to(np.array([110, 50, 80], np.uint8), (BATCH, 8, 8, 3))
    out, gray, colored = (
        apply(augmentation.color_jitter, image, config).image for image in (halves, halves[..., :1], color)
    )
    assert np.all(np.ptp(colored, axis=(1, 2)) == 0)
    np.testing.assert_array_equal(gray[..., 0], out[..., 0])  # saturation does not matter
    out, colored = out[..., 0].astype(float), colored[:, 0, 0].astype(float)
    brightness = (out[:, 0, 0] + out[:, 0, -1]) / 160
    contrast = (out[:, 0, -1] - out[:, 0, 0]) / 40 / brightness
    saturation = (colored[:, 0] - colored[:, 1]) / 60 / brightness / contrast
    factors = np.stack([brightness, contrast, saturation])
    assert np.all(np.abs(factors - 1) < 0.3 + 0.08)
    assert np.all(np.ptp(factors, axis=1) > 0.5)
    assert_mean(factors.T, 1)
    assert np.all(np.abs(np.corrcoef(factors) - np.eye(3)) < 0.15)


def test_random_resized_crop_interpolates_a_crop_of_random_area_aspect_and_position():
    """Ramps reveal where each pixel comes from; linear interpolation keeps their product."""
    row, column = np.indices((21, 25))
    image = np.broadcast_to(
        np.stack([12 * row, 10 * column, row * column // 2], -1).astype(np.uint8), (BATCH, 21, 25, 3)
    )
    out = apply(augmentation.random_resized_crop, image, AugmentConfig(random_resized_crop=0.3)).image
    assert out.dtype == np.uint8
    rows, columns, product = np.moveaxis(out.astype(float) / (12, 10, 0.5), -1, 0)
    assert np.all(np.ptp(rows, axis=2) == 0)
    assert np.all(np.ptp(columns, axis=1) == 0)
    assert np.max(np.abs(product - rows * columns)) < 5
    first, last = ((rows[:, i, 0], columns[:, 0, j]) for i, j in ((5, 6), (15, 18)))  # never clipped to the edge
    fractions = [(b - a) / steps for a, b, steps in zip(first, last, (10, 12), strict=True)]
    area, aspect = fractions[0] * fractions[1], fractions[1] / fractions[0]
    assert_mean(area, 0.65)
    assert 0.28 < area.min() < 0.33
    assert 0.97 < area.max() < 1.02
    assert_mean(np.log(aspect), 0)
    assert 0.72 < aspect.min() < 0.77
    assert 1.30 < aspect.max() < 1.38
    for start, fraction, steps, size in zip(first, fractions, (5, 6), (21, 25), strict=True):
        free = (1 - fraction) * size
        position = (start + 0.5 - (steps + 0.5) * fraction)[free > 3] / free[free > 3]
        assert -0.1 < position.min() < 0.1
        assert 0.9 < position.max() < 1.1
        assert_mean(position, 0.5)


@functools.cache
def mixed(**settings):
    """Return the own weight of each pixel (BATCH, 16, 20) and of each target, from images of 0 next to images of 1."""
    is_even = np.arange(BATCH) % 2 == 0
    image = np.broadcast_to(is_even[:, None, None, None], (BATCH, 16, 20, 1)).astype(np.float32)
    out = apply(augmentation.mix, image, AugmentConfig(**settings), jax.nn.one_hot(np.arange(BATCH) % 2, 2))
    np.testing.assert_allclose(out.target.sum(axis=1), 1, atol=1e-6)
    own = np.where(is_even[:, None, None, None], out.image, 1 - out.image)[..., 0]
    return own, np.where(is_even, out.target[:, 0], out.target[:, 1])


def test_mixup_weights_pixels_and_targets_alike():
    own, weight = mixed(mixup=0.5)
    np.testing.assert_allclose(own, np.broadcast_to(weight[:, None, None], own.shape), atol=1e-6)
    assert_mean(weight, 0.5)
    assert_mean((weight - 0.5) ** 2, 1 / 8)  # the variance of Beta(a, a) is 1 / (8 a + 4)


def test_cutmix_pastes_a_rectangle_and_weights_the_target_by_its_exact_area():
    own, weight = mixed(cutmix=1.0)
    assert set(np.unique(own)) == {0, 1}
    np.testing.assert_allclose(weight, own.mean(axis=(1, 2)), atol=1e-6)
    pasted = own == 0
    height, width = pasted.any(axis=2).sum(axis=1), pasted.any(axis=1).sum(axis=1)
    np.testing.assert_array_equal(pasted.sum(axis=(1, 2)), height * width)
    # A side s = sqrt(1 - weight) with a uniform center has s - s²/4 inside the image, and s² is uniform.
    assert_mean(weight, 1 - (1 / 2 - 1 / 5 + 1 / 48))
    inside = ~(pasted[:, [0, -1]].any(axis=(1, 2)) | pasted[:, :, [0, -1]].any(axis=(1, 2)))
    assert np.all(np.abs(height / 16 - width / 20)[inside] < 1 / 16 + 1 / 20)


def test_mixup_and_cutmix_together_use_one_of_them_per_example():
    own, _ = mixed(mixup=0.5, cutmix=1.0)
    is_mixup = np.any((own > 0) & (own < 1), axis=(1, 2))
    assert abs(is_mixup.sum() - BATCH / 2) < 5 * np.sqrt(BATCH) / 2
    for alone, chosen in ((mixed(mixup=0.5), is_mixup), (mixed(cutmix=1.0), ~is_mixup)):
        np.testing.assert_allclose(own[chosen], np.broadcast_to(alone[0], own.shape)[chosen], atol=1e-6)


def augmented(config, image, target, keys, partner):
    """Return the images and targets of all augmentations in `config`, each mixed with row `partner`."""
    context, c = make_context(config, keys, lambda rows: rows[partner]), image.shape[-1]
    return augmentation.augment(Examples(image, target), context, (1.0,) * c, (2.0,) * c)


def test_each_example_has_random_numbers_of_its_own():
    """The results depend neither on the position in the batch nor on other examples, except for the partner's image.

    The partner of each example stays the same here. Vectorized code may round differently at another position.
    """
    count = 64
    image, target = make_images(count, (16, 18, 3)), jax.nn.one_hot(np.arange(count), count)
    order, partner = np.random.default_rng(1).permutation(count), np.roll(np.arange(count), -1)
    step = jax.jit(functools.partial(augmented, EVERYTHING))
    keys, other_keys = KEYS[:count], KEYS[count : 2 * count]
    expected, other_epoch = (jax.device_get(step(image, target, chosen, partner)) for chosen in (keys, other_keys))
    moved = jax.device_get(step(image[order], target[order], keys[order], np.argsort(order)[partner[order]]))
    assert np.mean(np.abs(moved.image - expected.image[order]) > 1) < 1e-3
    np.testing.assert_allclose(moved.target, expected.target[order], atol=1e-5)
    assert np.all(np.any(expected.image != other_epoch.image, axis=(1, 2, 3)))


def test_nothing_is_added_to_the_step_by_default():
    image, context = make_images(4, (16, 16, 3)), make_context(AugmentConfig(), KEYS[:4])
    scale = (1.0,) * 3, (2.0,) * 3
    found = jax.make_jaxpr(lambda image: augmentation.augment(Examples(image, None), context, *scale).image)(image)
    assert str(found) == str(jax.make_jaxpr(lambda image: augmentation.normalize(image, *scale))(image))


@pytest.mark.parametrize("channels", [1, 3])
def test_all_augmentations_lower_for_accelerators(channels):
    image = jax.ShapeDtypeStruct((4, 16, 18, channels), "uint8")
    step = jax.jit(functools.partial(augmented, EVERYTHING))
    traced = step.trace(image, jax.ShapeDtypeStruct((4, 10), "float32"), KEYS[:4], np.arange(4))
    for platform in ("tpu", "cuda"):
        assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()
