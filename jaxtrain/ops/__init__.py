"""Which implementation of each op runs on this chip, and why."""
