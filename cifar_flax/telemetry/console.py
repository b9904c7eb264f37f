"""Terminal output."""

from collections.abc import Mapping
from typing import Any

from cifar_flax.telemetry.scalars import augmentation, is_fraction, other_scalars, title


def evaluation_table(result: Mapping[str, Any]) -> str:
    """Return the metrics of eval.json as a table to print."""
    name_width = max(len("class"), *(len(name) for name in result["per_class"]))
    correct = round(result["accuracy"] * result["num_examples"])
    lines = [
        f"{result['dataset']}, {result['split']} split, checkpoint of step {result['step']}{augmentation(result)}",
        f"  accuracy                    {result['accuracy']:.2%} ({correct} of {result['num_examples']})",
        f"  top-5 accuracy              {result['top5_accuracy']:.2%}",
        f"  loss                        {result['loss']!r}",
        f"  expected calibration error  {result['expected_calibration_error']!r}",
        *(
            f"  {title(name):26}  {f'{value:.2%}' if is_fraction(name) else repr(value)}"
            for name, value in other_scalars(result).items()
        ),
        "",
        f"  {'class':{name_width}}  precision  recall      F1",
    ]
    for name, row in result["per_class"].items():
        lines.append(f"  {name:{name_width}}  {row['precision']:9.2%}  {row['recall']:6.2%}  {row['f1']:6.2%}")
    return "\n".join(lines)
