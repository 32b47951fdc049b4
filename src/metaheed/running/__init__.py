"""Training, evaluating and comparing runs, and the folders that hold them."""
