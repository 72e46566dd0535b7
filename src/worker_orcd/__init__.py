"""worker-orcd: one GGUF model, resident in VRAM, served over HTTP."""

__version__ = "0.1.0"
