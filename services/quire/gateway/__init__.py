"""The gateway: OpenAI-compatible HTTP and the public gRPC service on one core. Text exists only here."""
