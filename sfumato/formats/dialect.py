"""Adapter key names as other programs spell them: written and read by one record."""
