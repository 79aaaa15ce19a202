"""The error of a strategy that cannot aggregate a round."""


class StrategyFailed(Exception):
    """Why the server could not make the next model of what the workers sent."""
