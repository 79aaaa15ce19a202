"""Methods of distributed training for any Flower project, a file each, and the strategy that runs them.

`strategies.local_sgd.LocalSGD` is the strategy and `strategies.method` the protocol of a method. The methods import
torch alone.
"""
