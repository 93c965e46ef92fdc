"""Every field of a run with its type, default and check; command lines; shipped configs."""
