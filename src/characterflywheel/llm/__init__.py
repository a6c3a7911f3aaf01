"""Chat models: one Protocol, several backends, and the shared prefix that makes them quick (DESIGN section 6)."""

from .base import ChatModel, Completion, Sampling

__all__ = ["ChatModel", "Completion", "Sampling"]
