"""The tiny model, see `tiny_model`."""

from tiny_model import tiny_folder

__all__ = ["tiny_folder"]
