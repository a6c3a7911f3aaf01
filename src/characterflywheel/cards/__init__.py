"""Character cards: characters as other programs keep them, and what of them the model is told (DESIGN section 5)."""

from .convert import card_of, character_of
from .png import read_card, read_png, write_png
from .prompt import PromptTooLongError, assemble, greeting, greetings

__all__ = [
    "PromptTooLongError", "assemble", "card_of", "character_of", "greeting", "greetings", "read_card", "read_png",
    "write_png",
]  # fmt: skip
