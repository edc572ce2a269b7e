"""How long a test waits for a process, so that one that never ends fails instead of blocking the suite."""

HANGS = 3600
"""Seconds; far above what any of these processes takes on the slowest machine."""
