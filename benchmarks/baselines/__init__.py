"""The runners of `benchmarks.compare`: this project and its baselines, each in its own process.

A module defines `VERSIONS` (package -> version) and a class `Runner`, whose protocol is `benchmarks.runner.Runner`.
"""
