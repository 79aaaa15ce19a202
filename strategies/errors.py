"""The error of a strategy that cannot aggregate a round."""


class StrategyFailed(Exception):
    """The server cannot compute the next model from what the workers sent; the message says why."""
