"""Tensor storage formats: what the stored bytes of each ggml type mean."""
