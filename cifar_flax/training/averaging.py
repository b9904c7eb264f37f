"""Averages of the weights over the steps of training."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from cifar_flax.errors import require

AVERAGES = ("none", "ema", "lookahead")


@dataclass(slots=True, kw_only=True)
class AveragingConfig:
    name: str = "none"  # none | ema (evaluated instead of the weights) | lookahead (the weights go back to it)
    decay: float = 0.999  # per step; lookahead: at the end of the run, from 0 at its start
    every: int = 1  # steps between two updates of the average

    def validate(self) -> None:
        require(self.name in AVERAGES, "averaging.name", self.name, f"must be one of {', '.join(AVERAGES)}")
        require(0 <= self.decay < 1, "averaging.decay", self.decay, "must be in [0, 1)")
        require(self.every >= 1, "averaging.every", self.every, "must be at least 1")


def init(config: AveragingConfig, weights: PyTree) -> PyTree:
    """The average before the first step: the weights themselves, nothing where none is kept."""
    return () if config.name == "none" else jax.tree.map(jnp.copy, weights)  # each is donated to the step


def update(
    config: AveragingConfig, step: Int[Array, ""], total_steps: int, weights: PyTree, average: PyTree
) -> tuple[PyTree, PyTree]:
    """Weights and average after the step number `step`, counted from 1, that gave `weights`.

    ema: average = d average + (1 - d) weights, where d per step is min(decay, (1 + step) / (10 + step)), so that the
    first weights are soon forgotten. lookahead: likewise with d = decay (step / total_steps)^3, and the weights become
    the average; after the last step they always do.

    Source: Jordan 2024 (arXiv:2404.00498), section 3.4, after Zhang et al. 2019, "Lookahead Optimizer" (lookahead).
    """
    if config.name == "none":
        return weights, average
    due = step % config.every == 0
    if config.name == "ema":
        decay = jnp.minimum(config.decay, (1 + step) / (10 + step)) ** config.every
    else:
        decay = config.decay**config.every * (step / total_steps) ** 3
    share = jnp.where(due, 1 - decay, 0.0)
    average = jax.tree.map(lambda mean, now: mean + share * (now - mean), average, weights)
    if config.name == "lookahead":
        back = due | (step == total_steps)
        weights = jax.tree.map(lambda mean, now: jnp.where(back, mean, now), average, weights)
    return weights, average


def evaluated(config: AveragingConfig, weights: PyTree, average: PyTree) -> PyTree:
    """What is evaluated: the average where it is kept beside the weights."""
    return average if config.name == "ema" else weights
