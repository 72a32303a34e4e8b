"""Cameras estimated from frames, and how far they are from the ones asked for."""
