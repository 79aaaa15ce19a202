"""fedsim's command line: ``python run.py --help``."""

from fedsim.cli import main

if __name__ == "__main__":
    main()
