"""``run.py bench``: the variants of running a round of LocalSGD, two baselines without fedsim, and their timing."""
