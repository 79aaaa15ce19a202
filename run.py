"""fedsim's command line: ``python run.py --help``."""

from fedsim.__main__ import main

if __name__ == "__main__":
    main()
