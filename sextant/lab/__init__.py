"""Experiments that can be believed: same data, paired seeds, intervals, and the plots that show them."""
