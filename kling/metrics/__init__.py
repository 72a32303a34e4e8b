"""Tensors in, numbers out; and the rulers of cameras, with the controls that a metric must rank right."""
