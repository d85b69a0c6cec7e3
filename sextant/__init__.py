"""Sextant: design, budget, train, convert, evaluate and serve long-context sparse language models."""

__version__ = "0.1.0"
