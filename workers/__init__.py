"""What one worker does to one shard or batch: pure functions with a thin class around them. Never imports ray."""
