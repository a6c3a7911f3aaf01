"""Annotation (PAPER section 2): alternatives from a pool of policies, tasks for reviewers, preference pairs."""
