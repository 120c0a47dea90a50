"""Find, load and save checkpoints, or make models of random weights."""
