"""The demo: generated scenes with known truth, the run over them, its scores."""
