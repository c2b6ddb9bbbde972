"""Masks of things, found in photos without labels: a worker, and the generators that it may hold."""

from workers.instances.worker import InstanceWorker

__all__ = ["InstanceWorker"]
