"""The HTTP edge: validation, text, streaming and lifecycle over an `InferenceEngine`; knows no tensors."""
