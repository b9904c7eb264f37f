"""Count the floating-point operations of a run on CIFAR-10, without running it. `docs/records.md` states the rules.

python -m benchmarks.flops --config configs/airbench94.py
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator

from benchmarks.programs import DATASET, TEST_EXAMPLES
from cifar_flax import arguments
from cifar_flax.config import AirbenchConfig, Config
from cifar_flax.data import order
from cifar_flax.data.augment import VIEWS
from cifar_flax.data.config import require_splits
from cifar_flax.data.info import DatasetInfo
from cifar_flax.errors import ConfigError, require
from cifar_flax.training.evaluator import evaluation_passes
from cifar_flax.training.operations import on_one_device, parts, phases


def published_flops(config: Config, info: DatasetInfo, num_test: int) -> int:
    """Return the operations of a run of an airbench network as airbench counts them.

    They are three forward passes per training image and one per TTA view, in which convolutions compute all outputs,
    also those that the pooling drops. Whitening and optimizer do not count.
    """
    task, _ = on_one_device(config, info)
    forward = functools.partial(_airbench_forward, config.model, num_classes=len(info.class_names))
    images = [
        (3 * config.train.batch_size * count, phase.side or info.image_shape[0]) for _, count, phase in phases(task)
    ]
    of_test = evaluation_passes(num_test, config.eval.tta, config.eval.tta_fraction)
    images += [(len(VIEWS[tta]) * count, info.image_shape[0]) for count, tta in of_test]
    return sum(count * forward((side, side, info.image_shape[2])) for count, side in images)


def _airbench_forward(model: AirbenchConfig, image_shape: tuple[int, int, int], num_classes: int) -> int:
    height, width, channels = image_shape[0] - 1, image_shape[1] - 1, 8 * image_shape[2]
    total = 2 * height * width * (4 * image_shape[2]) * channels
    for filters in model.widths:
        total += 2 * height * width * 9 * channels * filters
        height, width, channels = height // 2, width // 2, filters
        total += (model.depth - 1) * 2 * height * width * 9 * channels * filters
    inputs = channels * (1 if model.global_pool else height // 3 * (width // 3))
    return total + 2 * inputs * num_classes


def cifar10(config: Config) -> tuple[DatasetInfo, int]:
    """Return the training data of a run of `config` on CIFAR-10 and the number of its evaluation images.

    Raise `ConfigError` if `config` is for other data.
    """
    data = config.data
    allowed = "must be cifar10; benchmarks.speedrun counts the operations for other data"
    require(data.name == "cifar10" and not data.is_folder, "data.name", data.name, allowed)
    require_splits(data, ("train", "test"))
    sizes = {"train": DATASET.num_examples, "test": TEST_EXAMPLES}
    examples, _ = order.split_validation(sizes[data.train_split], data.validation_fraction)
    side = data.image_size or DATASET.image_shape[0]
    info = dataclasses.replace(DATASET, image_shape=(side, side, 3), num_examples=len(examples))
    return info, sizes[data.eval_split]


def table(config: Config) -> Iterator[str]:
    """Yield the lines of a table of the parts of a run of `config` on CIFAR-10."""
    data = cifar10(config)
    found = parts(config, *data)
    rows = [(part.name, f"{part.number:,} {part.unit}", part.flops) for part in found]
    rows.append(("total", "", sum(part.flops for part in found)))
    if isinstance(config.model, AirbenchConfig):
        rows.append(("by airbench's count: 3 forward passes per training image", "", published_flops(config, *data)))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, amount, flops in rows:
        yield f"{name:{widths[0]}}  {amount:>{widths[1]}}  {flops / 1e15:10.6f} PFLOP"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="--config.FIELD=VALUE overrides a field of it")
    args, overrides = parser.parse_known_args()
    try:
        print(*table(arguments.parse(["--config", args.config, *overrides]).config), sep="\n")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
