"""The columns of ``layer.csv``."""

_MACHINE = ("taken_at", "commit", "device", "torch", "triton", "python", "cuda", "matmul_tflops", "copy_tbs")
_CASE = ("case", "variant", "layers", "width", "heads", "head_dim", "batch", "total_rows", "contender")
COLUMNS = (*_MACHINE, *_CASE, "p20_ms", "p50_ms", "p80_ms", "samples", "gflop", "tflops", "peak_mib", "relative_error")
