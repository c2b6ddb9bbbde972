"""What a user does with a run folder: run, status and plan, clean, submit to a cluster."""
