"""Class maps of stuff: what one worker does to one shard, by method."""
