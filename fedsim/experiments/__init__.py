"""Studies: lists of configurations, run one by one or on Ray."""
