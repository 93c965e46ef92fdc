"""Trains one model on several sites that exchange compressed changes of the weights.

A site is one job with its own cluster, mesh and checkpoints. Nothing that crosses sites is inside a
compiled program.
"""

BLOCK = 1024  # elements; a process owns, encodes and sends whole blocks of a fragment
