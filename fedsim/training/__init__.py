"""The training step, the plan of a run, a worker's local round, centralized training, stacked replicas."""
