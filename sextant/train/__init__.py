"""Training: the loop and what it needs to be trusted: durable checkpoints, run folders, schedules, watches."""
