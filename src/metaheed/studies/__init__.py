"""What is made of many runs: searches, recipes, reproductions, reports, the toy and the demo."""
