"""The machine and the process: files, locks, signals, memory, and what may be imported late."""
