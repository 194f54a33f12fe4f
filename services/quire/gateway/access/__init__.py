"""Who may ask this gateway, and how much: API keys, their limits, and the gateway's own."""
