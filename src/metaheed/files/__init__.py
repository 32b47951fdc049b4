"""Files that a stranger may have written: opened, read, parsed, sealed, trusted and written in one place."""
