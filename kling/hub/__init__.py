"""Published weights: the registry, names of parameters, loading and exporting."""
