"""What the machines of a federation need: certificates, keys, scripts, units and settings."""
