"""Results for people: the page of a run, the comparison of runs, the picture of a confusion matrix."""
