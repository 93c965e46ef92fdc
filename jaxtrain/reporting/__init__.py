"""Writes metrics: files, TensorBoard, Prometheus, the terminal, tables and loss curves."""
