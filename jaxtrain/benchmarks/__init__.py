"""The suites of `jaxtrain bench`, and what they time with."""
