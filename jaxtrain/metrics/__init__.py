"""Measures step times, FLOPs, MFU, collectives and network bytes."""
