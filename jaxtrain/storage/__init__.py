"""Where a checkpoint's arrays rest: a folder that all processes share, or process 0's own."""
