"""Generate one clip dense and sparse, measure the difference, and show it."""
