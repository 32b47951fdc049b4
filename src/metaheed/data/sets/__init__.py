"""One file for each data set: where its published files lie, what is in them, and how its classes are split."""
