"""``python -m fedsim``: the same as ``python run.py``."""

from fedsim.interrupts import exit_on_signals


def main() -> None:
    """Run the command line of this process."""
    with exit_on_signals():
        from fedsim.cli import main as run  # after the handlers are set, since it takes a moment to import

        run()


if __name__ == "__main__":
    main()
