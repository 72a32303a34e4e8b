"""Where a camera is and how it sees: named axes and moves, trajectory files, and the rays that a model is shown."""
