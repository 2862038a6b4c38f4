"""What the Triton kernels of all operators share; `launcher` imports Triton when a call asks for it."""
