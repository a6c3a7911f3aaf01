"""Reward models: preference first, user signals as auxiliaries (PAPER section 3)."""
