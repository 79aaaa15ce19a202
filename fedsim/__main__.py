"""``python -m fedsim``: the same as ``python run.py``."""

from fedsim.system.interrupts import exit_on_signals


def main() -> None:
    """Run the command line of this process."""
    with exit_on_signals():
        from fedsim.cli import main as run  # slow to import, so the signal handlers are set first

        run()


if __name__ == "__main__":
    main()
