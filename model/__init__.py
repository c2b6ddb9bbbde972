"""Networks, descriptors, losses and metrics on torch, torchvision, timm and numpy. Never imports ray."""
