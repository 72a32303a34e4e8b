"""From noise to data: path, levels, solvers, guidance, the sampling loop and the loss. Independent of any model."""
