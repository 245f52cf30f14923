"""Parts of the training loop: optimizers, sharding, policies, meters, saving, evaluation, and a run's log."""
