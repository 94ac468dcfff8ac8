"""Accord aligns text-to-image diffusion models with human feedback."""

__version__ = "0.1.0"
