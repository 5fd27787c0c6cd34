"""What one GPU does in nine minutes."""
