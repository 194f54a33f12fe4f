"""Names that the operator and what it makes agree on: the resource, labels, annotations, ports."""

from __future__ import annotations

GROUP = "quire.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InferenceService"
PLURAL = "inferenceservices"

# One field manager for all that is written: server-side apply drops what it no longer asks for.
FIELD_MANAGER = "quire-operator"

# On every object that the operator makes, and on its pods.
MANAGED_BY = "app.kubernetes.io/managed-by"
SERVICE = f"{GROUP}/service"
COMPONENT = "app.kubernetes.io/component"
# The hash of what the operator asked for. It changes when a field is dropped, which the field's absence can't tell.
DESIRED_HASH = f"{GROUP}/desired-hash"
# On the engines' Deployment: the revision that it was made of, in words.
MADE_OF = f"{GROUP}/made-of"
# On a canary's pods and on its Service, whose labels routers see on its EndpointSlices.
REVISION = f"{GROUP}/revision"
CANARY_PERCENT = f"{GROUP}/canary-percent"
# On pod templates: a changed ConfigMap rolls the pods.
CONFIG_HASH = f"{GROUP}/config-hash"
# On the first pod of an engine that spans nodes: what the pods of its group are made of.
TEMPLATE_HASH = f"{GROUP}/template-hash"

# What LeaderWorkerSet's own webhook gives to the pods of a group: variables in containers, and a label.
LEADER_ADDRESS, WORKER_INDEX = "LWS_LEADER_ADDRESS", "LWS_WORKER_INDEX"
GROUP_KEY = "leaderworkerset.sigs.k8s.io/group-key"

# Ports inside pods and of Services.
GATEWAY_HTTP, GATEWAY_GRPC = 8000, 8001
ROUTER_GRPC, ROUTER_METRICS = 9000, 9090
ENGINE_GRPC, ENGINE_METRICS, SIDECAR_METRICS = 9100, 9190, 9191
# Where the nodes of one engine find each other; what they say then goes over ports that NCCL chooses.
ENGINE_RENDEZVOUS = 29500

# The user and group in every image (see manifests/images).
USER = 10001
