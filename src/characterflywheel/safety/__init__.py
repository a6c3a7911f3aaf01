"""Safety and privacy (PAPER sections 1 and 9): what may be said, and what may never leave the event store."""

from .policy import SafetyPolicy, SafetyVerdict
from .privacy import Finding, find_identifiers

__all__ = ["Finding", "SafetyPolicy", "SafetyVerdict", "find_identifiers"]
