"""Matrices times vectors, with weights in their quantized tiles."""
