"""The command line: each command is a few lines over a module that does the work."""
