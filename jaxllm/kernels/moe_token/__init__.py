"""One token through layers with experts."""
