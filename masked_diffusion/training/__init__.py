"""What the training loop is built from: optimizers, sharding, meters, evaluation, and reading a run's log."""
