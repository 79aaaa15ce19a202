"""fedsim: how often must machines that train together talk, and what does it cost?"""

__version__ = "0.1.0"
