"""Whole layers with a gated feed-forward for one token in one launch."""
