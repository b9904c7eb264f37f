"""Test the count of operations: of single functions by hand, of whole runs by sums over layers, and in the headers."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import flops
from benchmarks.programs import DATASET
from cifar_flax import arguments
from cifar_flax.config import AirbenchConfig, Config, DataConfig, EvalConfig, TrainConfig
from cifar_flax.models.flops import matrix_flops
from cifar_flax.training import operations

CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py"))
# To trace the programs of a config takes up to six seconds under the type checks of the tests.
LONG = pytest.mark.slow
SLOW_AIRBENCH = ("airbench94", "airbench94_muon", "airbench95", "airbench96", "laptop")
AIRBENCH = ["airbench94_wide", *(pytest.param(name, marks=LONG) for name in SLOW_AIRBENCH)]
CIFAR10 = [*AIRBENCH, "default", *(pytest.param(name, marks=LONG) for name in ("notebook", "resnet18"))]


def traced(function, *shapes):
    """Return the count of `function` for float32 arrays of `shapes`."""
    return matrix_flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)))


def convolve(x, kernel, stride=1, padding="SAME", groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride,) * 2, padding, dimension_numbers=numbers, feature_group_count=groups
    )


X, KERNEL = (5, 8, 6, 4), (3, 3, 4, 7)


@pytest.mark.parametrize(
    ("settings", "kernel", "positions"),
    [
        ({}, KERNEL, 8 * 6),  # with the taps on the padding
        ({"padding": "VALID"}, KERNEL, 6 * 4),
        ({"stride": 2}, KERNEL, 4 * 3),
        ({"padding": ((1, 0), (1, 0))}, KERNEL, 7 * 5),
        ({"groups": 2}, (3, 3, 2, 6), 8 * 6),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_convolutions(settings, kernel, positions):
    forward = functools.partial(convolve, **settings)
    expected = 2 * 5 * positions * np.prod(kernel)
    assert traced(forward, X, kernel) == expected
    # A product with a zero that the stride inserts into the gradient is none; one with the padding of a gradient is.
    reached = positions if settings.get("padding", "SAME") == "SAME" else 8 * 6
    for number, products in ((0, 2 * 5 * reached * np.prod(kernel)), (1, expected)):
        gradient = jax.grad(lambda *arrays: jnp.sum(forward(*arrays) ** 2), number)
        assert traced(gradient, X, kernel) == expected + products


def test_matrix_products_and_control_flow():
    def product(x, y):
        return jnp.einsum("bij,bjk->bik", x, y)

    shapes, one = [(3, 4, 5), (3, 5, 5)], 2 * 3 * 4 * 5 * 5
    assert traced(product, *shapes) == one
    assert traced(jax.jit(product), *shapes) == one
    assert traced(jax.checkpoint(product), *shapes) == one
    assert traced(lambda x, y: lax.scan(lambda x, _: (product(x, y), None), x, length=7), *shapes) == 7 * one
    assert traced(lambda x, y: lax.map(lambda x: x @ y[0], x), *shapes) == one
    branches = [lambda x, y: x, product, lambda x, y: product(product(x, y), y)]
    assert traced(lambda x, y: lax.switch(x[0, 0, 0].astype(int), branches, x, y), *shapes) == 2 * one

    def loop(x, y, count):
        return lax.fori_loop(0, count, lambda _, x: product(x, y), x)

    assert traced(lambda x, y: loop(x, y, 7), *shapes) == 7 * one
    jaxpr = jax.make_jaxpr(loop)(np.ones(shapes[0]), np.ones(shapes[1]), 3)
    assert matrix_flops(jaxpr, unknown=7) == 7 * one


def test_results_that_are_not_used_do_not_count():
    def layers(x, first, second):
        return jnp.sum((lax.stop_gradient(x @ first) @ second) ** 2)

    shapes, one = [(8, 4), (4, 4), (4, 4)], 2 * 8 * 4 * 4
    assert traced(layers, *shapes) == 2 * one
    assert traced(jax.grad(layers, (0, 1, 2)), *shapes) == 3 * one  # two products, and the gradient of `second`
    assert traced(jax.grad(jax.jit(layers), (0, 1, 2)), *shapes) == 3 * one
    assert traced(lambda x, y: (x @ y, x)[1], (4, 4), (4, 4)) == 0

    def unused_carry(x, y):
        return lax.scan(lambda carry, _: ((carry[0] + 1, carry[1] @ y), None), (0, x), length=7)[0][0]

    assert traced(unused_carry, (4, 4), (4, 4)) == 0


def test_a_program_on_several_devices_counts_one_of_them():
    def product(x, y):
        return lax.psum(x @ y, "data")

    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(product, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    assert traced(sharded, (16, 8), (8, 8)) == 2 * (16 // 4) * 8 * 8


# The multiply-adds of a layer for an image: (forward pass, gradient of the input, gradient of the kernel).


def full(side, taps, c_in, c_out):
    return np.full(3, side**2 * taps * c_in * c_out)


def pooled(side, taps, c_in, c_out):
    """Return those of a convolution before a 2x2 max-pool, which does not compute outputs that the pooling drops."""
    kept, of_input = (full(size, taps, c_in, c_out)[0] for size in (side // 2 * 2, side))
    return np.array([kept, of_input, kept])


def airbench(widths, depth, side=32, pooled=pooled):
    """Return the layers: whitening (2x2 patches), three blocks of 3x3 convolutions, head."""
    layers, side, c_in = [full(side - 1, 4, 3, 24)], side - 1, 24
    for width in widths:
        layers += [pooled(side, 9, c_in, width), *[full(side // 2, 9, width, width)] * (depth - 1)]
        side, c_in = side // 2, width
    return np.array([*layers, full(1, 1, c_in, 10)])


# Of airbench's own recipes, of which the config airbench95 is not one: name -> widths, depth, epochs, images per step,
# published PFLOP.
ORIGINALS = {
    "airbench94_muon": ((64, 256, 256), 2, 8, 2000, 0.298),
    "airbench95": ((128, 384, 384), 2, 15, 1024, 1.37),
    "airbench96": ((128, 384, 512), 3, 37, 1024, 4.99),
}
# Of the configs: name -> widths, depth, images per step, and the steps, the image's side and the whitening bias of each
# phase.
PHASES = {
    "airbench94": ((40, 160, 160), 3, 250, [(50, 20, True), (2750, 20, False), (1300, 32, False)]),
    "airbench94_wide": ((64, 256, 256), 2, 1536, [(8, 24, True), (88, 24, False), (96, 28, False), (104, 32, False)]),
    "airbench94_muon": ((64, 256, 256), 2, 2000, [(75, 32, True), (125, 32, False)]),
    "airbench95": ((72, 288, 288), 3, 250, [(50, 20, True), (3550, 20, False), (1900, 32, False)]),
    "airbench96": ((128, 384, 512), 3, 1024, [(144, 32, True), (1632, 32, False)]),
    "laptop": ((40, 160, 160), 2, 500, [(25, 20, True), (675, 20, False), (250, 32, False)]),
}
# The images of the final evaluation, each with its number of TTA views.
EVALUATED = {
    "airbench94": [(10_000, 1), (2_500, 6)],
    "airbench94_wide": [(10_000, 1), (2_500, 6)],
    "airbench94_muon": [(10_000, 6)],
    "airbench95": [(10_000, 1), (2_500, 6)],
    "airbench96": [(10_000, 6)],
    "laptop": [(10_000, 1), (2_500, 6)],
}


def config_of(name):
    return arguments.parse(["--config", str(REPOSITORY / "configs" / f"{name}.py")]).config


@functools.cache
def parts(name):
    config = config_of(name)
    return flops.parts(config, *flops.cifar10(config))


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_convention_of_airbench(name):
    """It ignores that parts of the gradient are not computed, outputs that the pooling drops, and the optimizer."""
    widths, depth, epochs, batch, pflop = ORIGINALS[name]
    forward = 2 * airbench(widths, depth, pooled=full)[:, 0].sum()
    total = forward * (3 * (50_000 // batch) * epochs * batch + 6 * 10_000)
    assert total == pytest.approx(pflop * 1e15, rel=2e-3)
    if name == "airbench94_muon":
        assert forward == pytest.approx(236.3e6, rel=2e-4)
    config = Config(
        data=DataConfig(drop_last=True),
        model=AirbenchConfig(widths=widths, depth=depth),
        train=TrainConfig(batch_size=batch, epochs=epochs),
        eval=EvalConfig(tta="mirror_translate"),
    )
    assert flops.published_flops(config, *flops.cifar10(config)) == total


@pytest.mark.parametrize("name", AIRBENCH)
def test_operations_of_the_programs_of_airbench(name):
    widths, depth, batch, phases = PHASES[name]
    optimizer = 0
    if config_of(name).optim.name == "muon":
        # Three steps X -> (a + b X X' + c (X X')²) X for all kernels of a short side at once, padded to their longest:
        # those of the first block, and those of the others.
        assert widths[1] == widths[2]
        kernels = ((depth, widths[0]), (2 * depth, widths[1]))
        optimizer = 3 * sum(number * (2 * rows**2 * 9 * rows + rows**3) for number, rows in kernels)
    expected = [5000 * 31**2 * 12**2]  # covariance of the patches of 2x2 pixels with 3 channels
    for steps, side, is_trained in phases:
        forward, by_input, by_kernel = airbench(widths, depth, side).T
        # The kernel of the first layer is constant, and its input is the image: it has no gradient but that of its
        # bias, which is a sum. Without that, the input of the second layer has no gradient either.
        layers = forward.sum() + by_kernel[1:].sum() + by_input[1 if is_trained else 2 :].sum()
        resizing = 3 * (side * 32 * 32 + side * side * 32) if side != 32 else 0  # the height, then the width
        expected.append(steps * (batch * (layers + resizing) + optimizer))
    forward = airbench(widths, depth)[:, 0].sum()
    expected += [count * views * forward for count, views in EVALUATED[name]]
    found = parts(name)
    assert [part.flops for part in found] == [2 * value for value in expected]
    assert [(part.number, part.unit) for part in found] == [
        (5000, "images"), *((steps, "steps") for steps, *_ in phases), *((n, "images") for n, _ in EVALUATED[name]),
    ]  # fmt: skip


def test_operations_of_the_programs_of_the_reference_cnn():
    """The first layer has no gradient of its input, the images."""
    conv, hidden, head = 30**2 * 9 * 3 * 32, 15**2 * 32 * 512, 512 * 10
    found = parts("default")
    step = 256 * (2 * conv + 3 * (hidden + head))
    assert [part.flops for part in found] == [0, 2 * 5469 * step, 2 * 10_000 * (conv + hidden + head)]


def lines(name, field):
    text = (REPOSITORY / "configs" / f"{name}.py").read_text().split('"""')[1]
    return re.findall(rf"^{field}: +(.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("name", CIFAR10)
def test_headers_state_the_operations_of_the_programs(name):
    found = parts(name)
    assert set(lines(name, "Operations")) == {operations.pflop(sum(part.flops for part in found))}


@pytest.mark.parametrize("name", CONFIGS)
def test_headers_state_accuracies_in_one_format(name):
    stated = lines(name, "Accuracy")
    assert stated
    for line in stated:
        is_single = re.match(r"not measured|\d+\.\d\d % \(seed \d+\)", line)
        assert is_single or re.fullmatch(r"\d\d\.\d\d % \(mean of n=\d+; standard deviation \d+\.\d\d\)", line), line


def test_numbers_of_operations_have_three_digits():
    values = (0.29219e15, 0.02152e15, 1.3e15, 33.66e15, 133.9e15)
    assert list(map(operations.pflop, values)) == [
        "0.292 PFLOP",
        "0.0215 PFLOP",
        "1.30 PFLOP",
        "33.7 PFLOP",
        "134 PFLOP",
    ]


def start(monkeypatch, *options):
    monkeypatch.setattr("sys.argv", ["flops", *options])
    return flops.main()


def test_the_command_prints_all_parts_and_their_sum(monkeypatch, capsys):
    config = str(REPOSITORY / "configs" / "airbench94_wide.py")
    # Half of the train split is held out, so an epoch has 16 batches of 1,536 images.
    options = ["--config.data.validation_fraction=0.5", "--config.deterministic=True", "--config.eval.tta=mirror"]
    assert start(monkeypatch, f"--config={config}", *options) == 0
    rows = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows[:3]] == ["5,000 images", "4 steps", "44 steps"]
    *values, total, published = (float(row[-1].removesuffix(" PFLOP")) for row in rows)
    assert total == pytest.approx(sum(values), abs=3e-6)
    assert total < published


def test_the_command_is_for_cifar10(monkeypatch, capsys):
    assert start(monkeypatch, f"--config={REPOSITORY / 'configs' / 'quickstart.py'}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data.name='digits': ")
    assert "benchmarks.speedrun" in line


def test_phases_cover_the_run():
    task, _ = operations.on_one_device(config_of("airbench94_wide"), DATASET)
    firsts, counts, _ = zip(*operations.phases(task), strict=True)
    assert list(firsts) == [0, *itertools.accumulate(counts)][:-1]
    assert sum(counts) == task.total_steps
