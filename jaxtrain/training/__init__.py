"""The training step, the loop around it, and the parts of a run assembled from its config."""
