"""Accord aligns text-to-image diffusion models with human feedback, and serves the aligned models."""

__version__ = "0.1.0"
