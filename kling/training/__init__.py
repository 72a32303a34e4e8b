"""The parts of the training programs: examples, loop, optimizers, average, health, validation, export."""
