"""What may be learned, a task in each file (see `fedsim.data.task`)."""
