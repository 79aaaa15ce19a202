"""Import torch faster, and in one piece where a signal arrives."""

from __future__ import annotations

import gc
import sys
from importlib import import_module

from fedsim.system.interrupts import signals_held


def import_torch() -> None:
    """Import torch, if it is not imported yet, with signals held and without garbage collection.

    An exception within the initialization of its C++ code aborts the process. It makes 300,000 objects that live as
    long as the process: collections among them take 0.2 s each, and later ones leave them out.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        with signals_held():
            import_module("torch")
    finally:
        gc.freeze()
        gc.enable()
