"""Evaluation tasks: their files, and their examples as tokens."""
