"""Processes, the device mesh, agreement between processes, signals and heartbeats."""
