"""Writes that were acknowledged and wait in memory."""
