"""Learning from labels: samples, augmentation, the trainer, self-training."""
