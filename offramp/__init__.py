"""Offramp: an OpenAI-compatible inference server with adaptive early exit."""

__version__ = "0.1.0"
