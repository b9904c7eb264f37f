import re
import struct

import numpy as np
import pytest
from conftest import REPOSITORY

from cifar_flax.report import charts, confusion


def test_thinning_keeps_spikes_of_a_long_run():
    x, y = np.arange(100_000) / 300.0, np.random.default_rng(0).normal(0, 1, 100_000)
    y[[12_345, 54_321]] = 99, -99
    y[70_000:71_000] = np.nan
    few_x, few_y = charts.thin(x, y)
    assert len(few_x) <= 4 * 334
    for column in range(334):
        values, kept = y[np.floor(x) == column], few_y[np.floor(few_x) == column]
        if np.isnan(values).all():
            assert np.isnan(kept).all()
        else:
            values = values[~np.isnan(values)]
            expected = (values.min(), values.max(), values[0], values[-1])
            assert (np.nanmin(kept), np.nanmax(kept), kept[0], kept[-1]) == expected
    np.testing.assert_array_equal(charts.thin(x[::100], y[::100])[1], y[::100])  # too few points to be thinned


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.31, 0.98, [0.2, 0.4, 0.6, 0.8, 1]),
        (0.0, 0.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3.0, 12.0, [-5, 0, 5, 10, 15]),
        (0.0, 2e-5, [0, 5e-6, 1e-5, 1.5e-5, 2e-5]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert charts.linear_ticks(low, high) == ticks


def test_ticks_enclose_all_values():
    rng = np.random.default_rng(0)
    for _ in range(500):
        low, high = sorted(rng.normal(0, 1, 2) * 10.0 ** rng.integers(-30, 30, 2))
        ticks = charts.linear_ticks(low, high)
        assert 2 <= len(ticks) <= 9
        margin = 1e-6 * (ticks[-1] - ticks[0])
        assert ticks[0] <= low + margin
        assert high - margin <= ticks[-1]
        low, high = abs(low), abs(low) * 40 + abs(high)
        ticks = charts.log_ticks(low, high)
        assert 2 <= len(ticks) <= 9
        assert ticks[0] <= low * (1 + 1e-9)
        assert high <= ticks[-1] * (1 + 1e-9)


def test_confusion_matrix_of_many_classes_is_thinned():
    counts = np.ones((400, 400), np.int64)
    counts[3, 5] = 9
    drawn = confusion.heat_map(counts, [str(i) for i in range(400)])
    assert drawn.count("M") == confusion.CELLS + 1  # one of them is the frame
    assert len(drawn) < 500_000


def _contrast(one, other):
    """Return the contrast ratio of two colors (WCAG 2.1)."""
    luminances = []
    for color in (one, other):
        parts = np.asarray(color) / 255
        parts = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        luminances.append(float(parts @ (0.2126, 0.7152, 0.0722)))
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_has_enough_contrast(theme):
    style = (REPOSITORY / "cifar_flax" / "report" / "page.css").read_text()
    found = re.findall(r"--([\w-]+): #(\w{6});", style.split("@media screen")[theme])
    colors = {name: np.array(struct.unpack("3B", bytes.fromhex(value))) for name, value in found}
    assert len(colors) == 15
    for name, color in colors.items():
        if name in ("ink", "quiet") or name.startswith("series"):
            assert _contrast(color, colors["paper"]) >= 4.5, name
    assert _contrast(colors["ink"], colors["panel"]) >= 4.5
    for cell in ("hit", "miss"):
        for depth in np.linspace(0, 1, 50):
            opacity = confusion.opaque(depth)
            mixed = opacity * colors[cell] + (1 - opacity) * colors["paper"]
            assert _contrast(colors["ink"], mixed) >= 4.5, (cell, depth)
