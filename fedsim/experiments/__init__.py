"""One run, studies of many, the runners that run their cells (in this process or on Ray), and what they cost."""
