"""The suites of `python -m jaxtrain.bench`."""
