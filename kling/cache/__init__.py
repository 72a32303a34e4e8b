"""The latent cache: clips are encoded once, stored, and read in batches by trainings."""
