"""Generate one clip: settings, what it starts from, the sampling, the result."""
