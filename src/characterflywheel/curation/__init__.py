"""Data curation (PAPER section 1): filter, choose diverse prompts, keep the statistics of traffic, split by user."""
