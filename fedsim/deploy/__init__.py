"""``run.py deploy``: the certificates, keys, scripts, systemd units and settings of a federation."""
