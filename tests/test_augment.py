import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_flax.data.augment import AugmentConfig, augment, normalize
from cifar_flax.errors import ConfigError

BATCH = 400
IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (BATCH, 7, 9, 3), dtype=np.uint8))
KEYS = jax.random.split(jax.random.key(1), BATCH)


def candidates(image, padding, flip):
    """Every (rows, columns, flipped) that augmentation may choose, computed the plain way."""
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
    augmented = augment(IMAGES, KEYS, AugmentConfig(flip=flip, crop_padding=padding))
    for image, out in zip(np.asarray(IMAGES), np.asarray(augmented), strict=True):
        matches = [choice for choice, crop in candidates(image, padding, flip) if np.array_equal(crop, out)]
        assert len(matches) == 1
        chosen += matches
    for axis, values in ((0, 2 * padding + 1), (1, 2 * padding + 1), (2, 1 + flip)):
        counts = np.bincount([choice[axis] for choice in chosen], minlength=values)
        expected = BATCH / values
        assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected)), "each choice is equally likely"


def test_nothing_to_do_changes_nothing():
    np.testing.assert_array_equal(augment(IMAGES, KEYS, AugmentConfig()), IMAGES)


def test_result_does_not_depend_on_the_place_in_the_batch():
    config = AugmentConfig(flip=True, crop_padding=2)
    order = np.random.default_rng(1).permutation(BATCH)
    straight = augment(IMAGES, KEYS, config)
    np.testing.assert_array_equal(augment(IMAGES[order], KEYS[order], config), np.asarray(straight)[order])


def test_normalize_gives_mean_zero_and_deviation_one():
    pixels = np.asarray(IMAGES).reshape(-1, 3)
    mean, std = pixels.mean(axis=0), pixels.std(axis=0)
    out = normalize(IMAGES, tuple(mean.tolist()), tuple(std.tolist()))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out).reshape(-1, 3).mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(out).reshape(-1, 3).std(axis=0), 1, atol=1e-4)


def test_padding_larger_than_the_image_is_refused():
    AugmentConfig(crop_padding=6).validate_for((7, 9, 3))
    with pytest.raises(ConfigError, match=r"augment\.crop_padding=7: must be at most 6"):
        AugmentConfig(crop_padding=7).validate_for((7, 9, 3))
