"""Monitoring: what production's answers say, when they drift, and what to do about it."""
