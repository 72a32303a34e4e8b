"""What is given of a clip, and how it is given: the State, the tasks, and the layouts of older published weights."""
