"""What is measured: step times, FLOPs, MFU, collectives, network bytes."""
