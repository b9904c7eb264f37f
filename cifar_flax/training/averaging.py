"""Weight averaging over the steps of training: EMA and Lookahead."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from cifar_flax.errors import require

AVERAGES = ("none", "ema", "lookahead")


@dataclass(slots=True, kw_only=True)
class AveragingConfig:
    name: str = "none"  # none | ema (evaluated instead of the weights) | lookahead (replaces the weights)
    decay: float = 0.999  # EMA decay per step; lookahead: final decay, increased cubically from 0
    every: int = 1  # steps between updates of the average

    def validate(self) -> None:
        require(self.name in AVERAGES, "averaging.name", self.name, f"must be one of {', '.join(AVERAGES)}")
        require(0 <= self.decay < 1, "averaging.decay", self.decay, "must be in [0, 1)")
        require(self.every >= 1, "averaging.every", self.every, "must be at least 1")


def init(config: AveragingConfig, weights: PyTree) -> PyTree:
    """Return the average before the first step: a copy of the weights, or () without averaging."""
    return () if config.name == "none" else jax.tree.map(jnp.copy, weights)  # a copy, since the step donates both


def update(
    config: AveragingConfig, step: Int[Array, ""], total_steps: int, weights: PyTree, average: PyTree
) -> tuple[PyTree, PyTree]:
    """Return weights and average after step number `step`, counted from 1, whose update resulted in `weights`.

    Every `every` steps, average = d average + (1 - d) weights. ema: d = min(decay, (1 + step) / (10 + step))^every, so
    that the initial weights soon lose their influence. lookahead: d = decay^every (step / total_steps)^3, and the
    average then replaces the weights, also after the last step.

    Source: Jordan 2024 (arXiv:2404.00498), section 3.4, based on Zhang et al. 2019, "Lookahead Optimizer" (lookahead).
    """
    if config.name == "none":
        return weights, average
    due = step % config.every == 0
    if config.name == "ema":
        decay = jnp.minimum(config.decay, (1 + step) / (10 + step)) ** config.every
    else:
        decay = config.decay**config.every * (step / total_steps) ** 3
    fraction = jnp.where(due, 1 - decay, 0.0)
    average = jax.tree.map(lambda mean, now: mean + fraction * (now - mean), average, weights)
    if config.name == "lookahead":
        is_replaced = due | (step == total_steps)
        weights = jax.tree.map(lambda mean, now: jnp.where(is_replaced, mean, now), average, weights)
    return weights, average
