"""Who writes to a run directory: its lock, and whether the owner of the lock is alive."""
