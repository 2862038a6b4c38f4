"""SiLU of some columns in Triton; `launch` imports Triton when a call asks for it."""
