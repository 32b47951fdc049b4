"""Networks as pure functions of their parameters, and their derivatives."""
