"""What the training programs are made of: examples, optimizers, average, health, validation, export."""
