"""Speed and memory of each operator against its peers, after a correctness gate: ``python -m benchmarks``."""
