"""The sidecar in an engine's pod: grammars in, token masks out, while the engine's forward pass runs."""
