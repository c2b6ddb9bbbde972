"""COCO's files, read and written: panoptic JSON with PNGs, instances JSON, stuff PNGs."""
