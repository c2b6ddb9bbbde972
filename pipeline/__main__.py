"""`python -m pipeline` is `u2label`."""

from pipeline.command.cli import main

main()
