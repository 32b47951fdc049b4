"""Runs: training, judging and comparing them, and the folders that hold them."""
