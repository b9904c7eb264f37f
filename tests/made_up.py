"""Synthetic runs, for tests of the report and of `--mode=compare`."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from cifar_flax.data.cache import Arrays
from cifar_flax.report.run import write_report
from cifar_flax.training import metrics

HOSTILE = ("<script>alert(1)</script>", "\"'><img src=x onerror=alert(2)>", "</title></svg><b>&amp;", "a'b\"c & d")
MADE_BY = {"command": "python main.py --config 'a file.py'", "hardware": "2 cores; 1 GPU", "versions": {"jax": "0.10"}}


def line(step, split="train", **fields):
    """Return one line of metrics.jsonl."""
    figures = {"loss": 3 / step, "accuracy": 1 - 1 / step, "learning_rate": 1e-3, "images_per_second": 1000.0 + step}
    training_only = {"input_wait_fraction": 0.1, "skipped_steps": 0, "checkpoint_blocked_seconds": 0.0}
    return {"step": step, "epoch": step / 10, "split": split} | figures | training_only | fields


LINES = [line(step) for step in range(5, 35, 5)] + [line(step, "validation", accuracy=0.5) for step in (10, 20, 30)]


def evaluation(classes=4, count=40, side=8, channels=3, names=None, seed=0):
    """Return an evaluation result, the split that was evaluated, and the predicted probabilities."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % classes).astype(np.int32)
    logits = rng.normal(0, 1, (count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += 1.5
    images = rng.integers(0, 256, (count, side, side, channels), np.uint8)
    names = names or tuple(f"class {i}" for i in range(classes))
    sums = jax.device_get(metrics.evaluation_sums(*map(jnp.asarray, (logits, labels, np.ones(count, bool)))))
    summary = metrics.summarize(metrics.add(None, sums), names)
    result = {"dataset": "set/1.0.0", "split": "test", "step": 30} | summary
    return result, Arrays(images, labels, names, "set/1.0.0"), np.asarray(jax.nn.softmax(logits))


def write_log(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))


def report(folder, evaluated=None, lines=LINES, config=None, made_by=MADE_BY):
    """Write the report of a synthetic run to `folder` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    if lines is not None:
        write_log(folder, lines)
    record = {"config": config or {"seed": 0, "data": {"name": "set"}}} | ({"made_by": made_by} if made_by else {})
    result, arrays, probabilities = evaluated or evaluation()
    write_report(folder, result, record, arrays, probabilities)
    return folder / "report.html"


def run(folder, result=None, lines=LINES, config=None):
    """Write the files that `--mode=compare` reads to `folder` and return `folder`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(config or {"seed": 0, "optim": {"name": "sgd", "learning_rate": 0.1}})
    )
    if lines is not None:
        write_log(folder, lines)
    if result is not None:
        (folder / "eval.json").write_text(json.dumps(result))
    return folder
