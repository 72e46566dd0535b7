"""GGUF model files: reading (nothing in them is trusted) and writing."""
