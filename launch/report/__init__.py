"""Run directories read back: tables, pages, baselines, prices and comparisons."""
