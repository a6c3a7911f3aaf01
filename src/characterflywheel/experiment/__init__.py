"""Online evaluation: arms, exposures, engagement metrics, their analysis, power (PAPER section 7, DESIGN section 8)."""
