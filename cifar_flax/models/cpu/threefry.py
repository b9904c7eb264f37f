"""Random bits for many keys in one XLA fusion."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key, UInt32


def random_words(keys: Key[Array, " batch"], count: int) -> UInt32[Array, "batch count"]:
    """Return the bits of `jax.random.bits` for each Threefry key, computed in one fusion.

    Valid with `jax_threefry_partitionable=True`, JAX's default.

    On a CPU, JAX implements the cipher as a loop that writes its state to memory between rounds.

    Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3": Threefry-2x32 with 20 rounds.
    """
    first, second = jnp.split(jax.random.key_data(keys), 2, axis=1)
    schedule = (first, second, first ^ second ^ jnp.uint32(0x1BD11BDA))
    x, y = jnp.broadcast_to(first, (len(keys), count)), jnp.arange(count, dtype=jnp.uint32)[None, :] + second
    for four_rounds in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[four_rounds % 2]:
            x = x + y
            y = (y << rotation | y >> (32 - rotation)) ^ x
        x = x + schedule[(four_rounds + 1) % 3]
        y = y + schedule[(four_rounds + 2) % 3] + jnp.uint32(four_rounds + 1)
    return lax.optimization_barrier(x ^ y)
