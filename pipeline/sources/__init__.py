"""Where photos and human labels come from: listed, indexed, fetched, read."""
