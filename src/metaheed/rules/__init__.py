"""Batch rules: how the gradients of a meta-batch become the next θ."""
