"""Offline evaluation: win rate, production metrics, steerability, side by side (PAPER section 6)."""
