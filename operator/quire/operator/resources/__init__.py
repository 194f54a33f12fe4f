"""What an InferenceService becomes, one noun per file. Pure: `core` calls them, nothing here talks to a cluster."""
