"""`python -m pipeline` is `u2label`."""

from pipeline.cli import main

main()
