"""From a packed projection to queries, keys and values of every head, the first two normalised."""
