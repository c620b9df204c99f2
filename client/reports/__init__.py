"""What a run looked like: comparisons, quality scores, the HTML report."""
