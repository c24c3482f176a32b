"""From a source to a proven bundle: trace, write, check."""
