"""Federated private fine-tuning of language models with short noisy codes."""

__version__ = "0.1.0"
