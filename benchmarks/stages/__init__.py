"""Where the time of a kernel goes: kernels timed with one stage taken out at a time."""
