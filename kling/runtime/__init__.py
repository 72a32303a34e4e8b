"""The machine: devices and precision, processes, randomness, files, checkpoints, logs. Nothing here knows a model."""
