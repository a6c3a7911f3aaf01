"""Style artefacts: features, monitor, alarms (PAPER section 5)."""
