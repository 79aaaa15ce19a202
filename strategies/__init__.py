"""Server strategies for any Flower project, by name."""

from strategies.local_sgd import LocalSGD

STRATEGIES: dict[str, type[LocalSGD]] = {"localsgd": LocalSGD}

__all__ = ["STRATEGIES", "LocalSGD"]
