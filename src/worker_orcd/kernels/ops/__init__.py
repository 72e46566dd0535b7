"""The operations of a layer that are no matrix product."""
