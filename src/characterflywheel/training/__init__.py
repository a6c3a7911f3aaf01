"""Herding: rejection sampling, then SFT, DPO and online RL (PAPER section 4)."""
