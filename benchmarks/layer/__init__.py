"""Speed and memory of a training step of whole layers: ``python -m benchmarks.layer run|report``."""
