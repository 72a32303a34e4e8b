"""The machine: accelerator, randomness, optimiser, average, checkpoints, logs. Training loops are made of these; none knows a model."""
