"""The gated norm in Triton; `launch` imports Triton when a call asks for it."""
