"""Latents encoded once: how they are made, stored, and handed to a training in batches."""
