"""LocalSGD as a Flower app: server, clients, a round, and the ways to run them."""
