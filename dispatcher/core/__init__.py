"""Decisions: pure and synchronous. No await, no clock, no randomness, no I/O."""
