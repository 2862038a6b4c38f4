"""Speed of the attention kernels: ``python -m benchmarks.attention run|baselines|report``."""
