"""Tools that make, join and count datasets."""
