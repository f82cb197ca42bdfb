"""Runs that lead from data to a table: the demo, and the paper's experiments."""
