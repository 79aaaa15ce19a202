"""The command line."""

from fedsim.cli.main import main

__all__ = ["main"]
