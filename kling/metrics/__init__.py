"""Metrics: tensors in, numbers out; camera estimation and its references, and the control clips that a metric must rank correctly."""
