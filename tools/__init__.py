"""Command-line tools. Each parses its options, calls one library function and prints."""
