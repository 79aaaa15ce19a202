"""fedsim's command line: ``python run.py --help``."""

from fedsim.system.interrupts import exit_on_signals

if __name__ == "__main__":
    with exit_on_signals():
        from fedsim.cli import main  # slow to import, so the signal handlers are set first

        main()
