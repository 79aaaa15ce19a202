"""A module that parses its command line where it is imported."""

import argparse

argparse.ArgumentParser().parse_args(["--no-such-flag"])
