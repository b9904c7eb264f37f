"""Export the weights and the program of a model, and run an exported program."""
