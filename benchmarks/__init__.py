"""Speed and memory of every operator against its peers, after a correctness gate: ``python -m benchmarks``."""
