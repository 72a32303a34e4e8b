"""The known parts of a clip and how they reach the model: the State, the tasks, and the input layouts of older published weights."""
