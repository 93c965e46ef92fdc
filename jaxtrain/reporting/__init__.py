"""Where metrics are written: files, TensorBoard, Prometheus, the terminal and a loss curve."""
