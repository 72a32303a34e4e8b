"""From noise to data: path, levels, solvers, guidance, the loop and the loss. Knows no model."""
