"""Reads run directories and makes tables, pages, baselines, prices and comparisons of them."""
