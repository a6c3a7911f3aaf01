"""Online RL: the loop, one step's update, its samplers and rewards, its stops and alarms (PAPER section 4)."""

from .stage import RLSummary, train_rl

__all__ = ["RLSummary", "train_rl"]
