"""Compares optimizers: plan, runs, statistics, tables, verdicts and pictures of a study."""
