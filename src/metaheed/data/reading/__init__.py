"""Safe readers for published formats: archives, pickles, pictures and labels; and the download of published files."""
