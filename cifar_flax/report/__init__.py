"""HTML pages and plots of results: a run's report, comparisons of runs, the confusion matrix."""
