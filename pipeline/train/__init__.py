"""The fit of the panoptic model: its images, their order, and the loop, in one process or by Ray Train."""
