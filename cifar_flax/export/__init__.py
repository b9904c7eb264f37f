"""Export: the network as one serialized program, and a script that runs it."""
