"""The network as one program for others, and a script that runs it."""
