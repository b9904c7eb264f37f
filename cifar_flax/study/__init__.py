"""Studies: which runs they have, and how processes share them."""
