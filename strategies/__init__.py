"""Server strategies for any Flower project, by name."""

from flwr.serverapp.strategy import FedAvg

from strategies.local_sgd import LocalSGD

STRATEGIES: dict[str, type[FedAvg]] = {"localsgd": LocalSGD}

__all__ = ["STRATEGIES", "LocalSGD"]
