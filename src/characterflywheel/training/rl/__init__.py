"""Online RL: the loop, one step's update, its samplers and rewards, its stops and alarms (PAPER section 4)."""

from .stage import RLSummary, choose_prompts, train_rl

__all__ = ["RLSummary", "choose_prompts", "train_rl"]
