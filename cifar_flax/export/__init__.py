"""Export a model as one serialized program, with a script that runs it."""
