"""Every way to run a round of LocalSGD, timed in turn."""
