"""What a layer needs beside the kernels of its steps; `launch` imports Triton when a call asks for it."""
