"""What is built on top of the library: the command line and reports."""
