"""Compares training with an independent implementation in PyTorch, step by step."""
