"""Camera estimation from frames, and the errors between estimated and requested cameras."""
