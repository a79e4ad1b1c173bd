"""Helpers of the course: small functions on torch and transformers, one module per method."""

__version__ = "0.1.0"
