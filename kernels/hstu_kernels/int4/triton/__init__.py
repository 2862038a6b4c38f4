"""The dequantising gather in Triton; `launch` imports it when a call asks for it."""
