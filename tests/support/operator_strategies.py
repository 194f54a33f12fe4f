"""Hypothesis strategies for InferenceServices, and the bad specs that both the API server and `render` must refuse."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from quire.operator.spec import InferenceService, parse

Document = dict[str, Any]

_names = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
_quantities = st.sampled_from(["1", "500m", "2Gi", "1.5", "8G"])
_resources = st.fixed_dictionaries(
    {},
    optional={
        "requests": st.dictionaries(st.sampled_from(["cpu", "memory"]), _quantities | st.integers(0, 64)),
        "limits": st.dictionaries(st.sampled_from(["cpu", "memory"]), _quantities | st.integers(0, 64)),
    },
)
_hub = st.fixed_dictionaries(
    {"name": st.just("Qwen/Qwen3-8B")},
    optional={"tokenSecret": st.fixed_dictionaries({"name": _names}), "revision": st.sampled_from(["v1", "refs/pr/3"])},
)
_cache = st.fixed_dictionaries({"size": _quantities}, optional={"storageClass": _names})
_models = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"hub": _hub}, optional={"cache": _cache, "servedNames": st.lists(_names, max_size=3)}),
    st.fixed_dictionaries({"claim": st.fixed_dictionaries({"name": _names}, optional={"path": st.just("a/b.gguf")})}),
    st.fixed_dictionaries({"image": st.fixed_dictionaries({"reference": st.just("registry.example/m:1")})}),
)


def _with_gpus(engine: Document) -> Document:
    takes = engine.get("nodes", 1) > 1 or engine.get("kvDtype") == "fp8"
    return {**engine, "gpus": engine.get("gpus") or 1} if takes else engine


_engines = st.fixed_dictionaries(
    {},
    optional={
        "replicas": st.integers(0, 5),
        "autoscaling": st.fixed_dictionaries(
            {"maxReplicas": st.integers(3, 9)},
            optional={"minReplicas": st.integers(0, 3), "scaleInSeconds": st.integers(0, 600)},
        ),
        "gpus": st.integers(0, 8),
        "nodes": st.sampled_from([1, 1, 1, 2, 4]),
        "resources": _resources,
        "maxModelLen": st.integers(16, 10**6),
        "kvDtype": st.sampled_from(["auto", "fp8"]),
        "speculation": st.fixed_dictionaries({}, optional={"enabled": st.booleans(), "tokens": st.integers(1, 64)}),
        "kvCache": st.sampled_from(["1Mi", "512Mi", "8Gi", "1.5G", "1Ti"]),
        "surge": st.integers(0, 3),
        "extraArgs": st.lists(st.sampled_from(["--max-waiting=4", "--no-prefix-caching"]), max_size=2),
        "nodeSelector": st.dictionaries(_names, _names, max_size=2),
        "tolerations": st.lists(st.just({"key": "a", "operator": "Exists"}), max_size=2),
    },
).map(_with_gpus)
_labels = st.dictionaries(_names, _names, max_size=2)
_ways_in = {
    "ingress": st.fixed_dictionaries(
        {"host": st.just("llm.example")},
        optional={"className": _names, "tlsSecret": _names, "annotations": _labels},
    ),
    "httpRoute": st.fixed_dictionaries(
        {
            "gateways": st.lists(
                st.fixed_dictionaries({"name": _names}, optional={"section": _names}), min_size=1, max_size=2
            )
        },
        optional={"hostnames": st.just(["llm.example", "*.example"])},
    ),
}
_certificates = {"tlsSecret": _names}
_gateways = st.sampled_from([_ways_in, _certificates]).flatmap(
    lambda more: st.fixed_dictionaries(
        {},
        optional={
            **more,
            "replicas": st.integers(1, 4),
            "apiKeys": st.fixed_dictionaries({"name": _names}),
            "serviceType": st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer"]),
        },
    )
)
_canaries = st.fixed_dictionaries(
    {},
    optional={
        "weights": st.lists(st.integers(1, 99), min_size=1, max_size=3).map(sorted),
        "intervalSeconds": st.integers(1, 600),
        "minRequests": st.integers(0, 100),
        "maxErrorPercent": st.integers(0, 100),
    },
)
_observability = st.fixed_dictionaries(
    {},
    optional={
        "otlpEndpoint": st.just("http://collector:4317"),
        "podMonitor": st.fixed_dictionaries({}, optional={"labels": _labels, "intervalSeconds": st.integers(1, 60)}),
    },
)

specs = st.fixed_dictionaries(
    {},
    optional={
        "model": _models,
        "engine": _engines,
        "router": st.fixed_dictionaries({}, optional={"replicas": st.integers(1, 4), "resources": _resources}),
        "gateway": _gateways,
        "tls": st.fixed_dictionaries({"secret": _names}),
        "rollout": st.fixed_dictionaries({}, optional={"canary": _canaries}),
        "observability": _observability,
        "imagePullSecrets": st.lists(_names, max_size=2),
    },
)


def document(spec: Document, *, name: str = "demo", uid: str = "uid-1") -> Document:
    """An InferenceService with `spec`, as the API's JSON has it."""
    return {
        "apiVersion": "quire.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": name, "namespace": "models", "uid": uid, "generation": 1},
        "spec": spec,
    }


services: st.SearchStrategy[InferenceService] = st.builds(lambda spec: parse(document(spec)), specs)
