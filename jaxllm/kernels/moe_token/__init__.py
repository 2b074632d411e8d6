"""One token through the second half of a layer with experts."""
