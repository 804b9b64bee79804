"""What is written down of each request: a line for the console, a row for the owner's store."""
