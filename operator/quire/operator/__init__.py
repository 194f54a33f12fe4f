"""The operator: makes an InferenceService object true in a Kubernetes cluster."""
