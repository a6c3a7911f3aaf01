"""The chat service: where people meet characters (DESIGN sections 2, 7, 8)."""
