"""GPU kernels and what launches them; only `backends/cuda.py` imports this folder."""
