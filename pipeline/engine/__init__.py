"""Running what it is handed: actors over shards, fits, receipts, the lease. It knows no stage and no method by name."""
