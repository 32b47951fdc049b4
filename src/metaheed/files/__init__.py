"""Open, read, parse, check and write files, some of which a stranger may have written."""
