"""How long a text is for a model that is not here to count."""


def estimated_tokens(text: str) -> int:
    """At least as many tokens as models make of ordinary text: one for three bytes (English has about four)."""
    return len(text.encode()) // 3 + 1
