"""The contestants of `benchmarks.compare`, each in a process of its own.

A module has `VERSIONS` and `Contestant(setting)`, with `train(steps)`, which returns when so many more steps are done,
and `evaluate(batch_size)`, which returns the accuracy on the test split.
"""
