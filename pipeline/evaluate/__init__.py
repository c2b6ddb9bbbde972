"""Scores of a run against human labels."""
