"""Safe readers of published formats: archives, pickles, pictures, labels and downloads."""
