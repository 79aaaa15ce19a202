"""LocalSGD as a Flower app: server, clients, a round, and the ways to run them."""

from fedsim.system.torch_import import import_torch

import_torch()  # first of all in the processes of Flower, which start one for each message
