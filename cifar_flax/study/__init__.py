"""Studies: runs over seeds and settings, which `report` compares."""
