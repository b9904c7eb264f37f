"""The runners of `benchmarks.compare`: this project and its baselines, each in its own process.

Each module except `original` defines `VERSIONS` (package -> version) and a class `Runner` that implements
`benchmarks.runner.Runner`. `original` runs the scripts of PyTorch speedruns for `benchmarks.speedrun`.
"""
