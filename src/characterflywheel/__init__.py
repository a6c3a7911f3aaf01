"""CharacterFlywheel: make AI characters better company, generation after generation.

The process is that of Meta's CharacterFlywheel paper (arXiv 2603.01973). Read `generation.py` first: it
composes one turn of the flywheel from top to bottom, in the paper's order and words.
"""

__version__ = "0.1.0"
