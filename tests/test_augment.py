"""Augmentations and TTA views against definitions in NumPy, and their random streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_flax.data import augment as augmentation
from cifar_flax.data.augment import VIEWS, AugmentConfig, Context, Examples, normalize, views

BATCH = 400
IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (BATCH, 7, 9, 3), dtype=np.uint8))
KEYS = jax.random.split(jax.random.key(1), BATCH)


def make_context(config, keys=KEYS, epoch=0, platform="cpu"):
    return Context(
        config=config,
        platform=platform,
        epoch=jnp.full(len(keys), epoch, jnp.int32),
        epoch_keys=keys,
        first_epoch_keys=KEYS,
        next_row=lambda rows: jnp.roll(rows, -1, axis=0),
    )


def flip_and_crop(image, keys, config, epoch=0, platform="cpu"):
    context = make_context(config, keys, epoch, platform)
    return augmentation.flip_and_crop(Examples(image, None), context).image


def cutout(image, size):
    return augmentation.cutout(Examples(image, None), make_context(AugmentConfig(cutout=size))).image


def candidates(image, padding, flip):
    """Yield every choice (row, column, flipped) that augmentation has, with its result computed by NumPy."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            crop = padded[row : row + height, column : column + width]
            yield (row, column, False), crop
            if flip:
                yield (row, column, True), crop[:, ::-1]


@pytest.mark.parametrize(("flip", "padding"), [(True, 0), (False, 2), (True, 2), (False, 3)])
def test_outputs_are_crops_and_mirror_images(flip, padding):
    chosen = []
    augmented = flip_and_crop(IMAGES, KEYS, AugmentConfig(flip="random" if flip else "none", crop_padding=padding))
    for image, out in zip(np.asarray(IMAGES), np.asarray(augmented), strict=True):
        matches = [choice for choice, crop in candidates(image, padding, flip) if np.array_equal(crop, out)]
        assert len(matches) == 1
        chosen += matches
    for axis, values in ((0, 2 * padding + 1), (1, 2 * padding + 1), (2, 1 + flip)):
        counts = np.bincount([choice[axis] for choice in chosen], minlength=values)
        expected = BATCH / values
        assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected)), "each choice is equally likely"


@pytest.mark.parametrize("shape", [(7, 9, 3), (9, 7, 1), (2, 5, 4), (3, 3, 3)])
@pytest.mark.parametrize("flip", ["none", "random", "alternating"])
def test_a_tpu_moves_the_same_bytes(shape, flip):
    """With each allowed padding, on images that contain every byte."""
    images = jnp.asarray(np.arange(BATCH * np.prod(shape)).astype(np.uint8).reshape(BATCH, *shape))
    assert len(np.unique(images)) == 256
    for padding in range(min(shape[:2])):
        config = AugmentConfig(flip=flip, crop_padding=padding)
        gathered, selected = (
            flip_and_crop(images, KEYS, config, epoch=1, platform=platform) for platform in ("cpu", "tpu")
        )
        assert selected.dtype == jnp.uint8
        np.testing.assert_array_equal(selected, gathered)
    assert "gather" not in program(images, config, "tpu")
    assert ("gather" in program(images, config, "cpu")) == (config != AugmentConfig())


def program(images, config, platform):
    return str(jax.make_jaxpr(lambda images: flip_and_crop(images, KEYS, config, platform=platform))(images))


def test_default_settings_change_nothing():
    np.testing.assert_array_equal(flip_and_crop(IMAGES, KEYS, AugmentConfig()), IMAGES)


def test_result_does_not_depend_on_the_position_in_the_batch():
    config = AugmentConfig(flip="random", crop_padding=2)
    order = np.random.default_rng(1).permutation(BATCH)
    expected = np.asarray(flip_and_crop(IMAGES, KEYS, config))[order]
    np.testing.assert_array_equal(flip_and_crop(IMAGES[order], KEYS[order], config), expected)


def test_normalized_images_have_mean_zero_and_standard_deviation_one():
    pixels = np.asarray(IMAGES).reshape(-1, 3)
    mean, std = pixels.mean(axis=0), pixels.std(axis=0)
    out = normalize(IMAGES, tuple(mean.tolist()), tuple(std.tolist()))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out).reshape(-1, 3).mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(out).reshape(-1, 3).std(axis=0), 1, atol=1e-4)


def test_alternating_flips_show_the_mirror_image_in_every_other_epoch():
    config = AugmentConfig(flip="alternating")
    other_keys = jax.random.split(jax.random.key(2), BATCH)  # each epoch has its own keys
    first, second, third = (
        np.asarray(flip_and_crop(IMAGES, keys, config, epoch))
        for epoch, keys in enumerate((KEYS, other_keys, other_keys))
    )
    np.testing.assert_array_equal(second, first[:, :, ::-1])
    np.testing.assert_array_equal(third, first)
    mirrored = np.array([not np.array_equal(a, b) for a, b in zip(first, np.asarray(IMAGES), strict=True)])
    assert 0.4 < mirrored.mean() < 0.6
    np.testing.assert_array_equal(first, flip_and_crop(IMAGES, KEYS, AugmentConfig(flip="random")))


def test_cutout_zeroes_one_square_inside_each_image():
    image = jnp.ones((BATCH, 7, 9, 3))
    np.testing.assert_array_equal(cutout(image, 0), image)
    corners = []
    for out in np.asarray(cutout(image, 4)):
        rows, columns = np.nonzero(out[..., 0] == 0)
        assert (rows.min() + 3, columns.min() + 3, len(rows)) == (rows.max(), columns.max(), 16)
        assert np.array_equal(out[..., 0], out[..., 1])
        corners.append((rows.min(), columns.min()))
    for axis, places in ((0, 4), (1, 6)):
        counts = np.bincount([corner[axis] for corner in corners], minlength=places)
        assert np.all(np.abs(counts - BATCH / places) < 5 * np.sqrt(BATCH / places))


def test_random_streams_are_independent_of_each_other():
    """With equal keys, for example, a square would always lie where the crop is."""
    context = make_context(AugmentConfig())
    names = ("flip", "crop_rows", "crop_columns", "cutout_rows", "cutout_columns", "mixup", "noise")
    keys = np.stack([np.asarray(jax.random.key_data(context.keys(name))) for name in names])
    assert len(np.unique(keys.reshape(-1, 2), axis=0)) == len(names) * BATCH


def test_random_streams_keep_their_bits():
    """Earlier releases split the key of an example into five; a run that continues has to draw the same numbers."""
    expected = jax.vmap(lambda key: jax.random.split(key, 5), out_axes=1)(KEYS)
    context = make_context(AugmentConfig())
    for number, name in enumerate(("flip", "crop_rows", "crop_columns", "cutout_rows", "cutout_columns")):
        found = jax.random.key_data(context.keys(name))
        np.testing.assert_array_equal(found, jax.random.key_data(expected[number]))
    np.testing.assert_array_equal(
        jax.random.key_data(make_context(AugmentConfig(), keys=KEYS[::-1]).keys("flip", first_epoch=True)),
        jax.random.key_data(expected[0]),
    )


@pytest.mark.parametrize("name", VIEWS)
def test_tta_views_match_their_definition(name):
    """The TTA views are the image and its two diagonal shifts, each with its mirror image."""
    got, image = np.asarray(views(IMAGES, name)), np.asarray(IMAGES)
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shifted = [image, padded[:, 0:7, 0:9], padded[:, 2:9, 2:11]]
    all_views = [view for shift in shifted for view in (shift, shift[:, :, ::-1])]
    expected = all_views[: {"none": 1, "mirror": 2, "mirror_translate": 6}[name]]
    np.testing.assert_array_equal(got, expected)
    assert len(VIEWS[name]) == len(expected)
    assert sum(VIEWS[name]) == 1
    assert sum(VIEWS["mirror_translate"][:2]) == 0.5  # of the unshifted image and its mirror image
