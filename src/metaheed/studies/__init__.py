"""Studies that consist of many runs: searches, recipes, reproductions and reports; also the toy and the demo."""
