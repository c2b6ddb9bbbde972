"""Weights of the panoptic model as files: detectron2's (`detectron2`) and our own (`files`)."""

from model.checkpoint.detectron2 import load_detectron2, read_detectron2, write_detectron2
from model.checkpoint.files import load_checkpoint, save_checkpoint

__all__ = ["load_checkpoint", "load_detectron2", "read_detectron2", "save_checkpoint", "write_detectron2"]
