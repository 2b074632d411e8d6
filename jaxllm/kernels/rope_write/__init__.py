"""Position embedding of queries and keys, and the writing of keys and values into their pages."""
