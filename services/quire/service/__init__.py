"""What every service shares: errors, requests and their wire form, page hashes, logs, traces, metrics, lifecycle."""
