"""Release: the gate that evidence must pass, and the registry of models in service (PAPER section 8)."""
