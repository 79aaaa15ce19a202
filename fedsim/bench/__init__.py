"""``run.py bench``: time the variants of running a round of LocalSGD, and two baselines without fedsim."""
