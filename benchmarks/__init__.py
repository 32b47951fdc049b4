"""Speed beside other libraries, against the machine's limit, and as the setting grows. See README.md here."""
