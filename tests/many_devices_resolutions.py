"""Training on images of changing size, with different layouts; test_parallel.py runs this file as `many_devices.py`."""

import itertools

import jax
import numpy as np
from many_devices import FULL_SIZE, IMAGES, INFO, batches, compile_step, make_config

from cifar_flax.models import AirbenchConfig
from cifar_flax.training import steps
from cifar_flax.training.setup import setup

if FULL_SIZE:  # airbench's network takes a minute to compile

    def test_losses_across_a_change_of_size_do_not_depend_on_the_layout():
        found = []
        for backend, devices in (("jit", 1), ("shard_map", 8)):
            config = make_config(backend, resolutions=((0, 12), (0.4, 16)))
            config.model = AirbenchConfig(widths=(4, 8, 8), global_pool=True)
            task, init = setup(config, INFO, jax.devices()[:devices])
            state = init(0, IMAGES.images[:300])
            (_, small), (first, large) = steps.phases(task)
            for start, phase in ((0, small), (first, large)):
                step = compile_step(phase, state)
                for batch in itertools.islice(batches(start), 2):
                    state, values = step(state, task.layout.shard_batch(batch))
                    found.append(float(values["loss"]))
        np.testing.assert_allclose(found[:4], found[4:], rtol=1e-4)
