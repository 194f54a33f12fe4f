"""Specs that are wrong: the API server and `render` both refuse them and say which field and what to write instead."""

from __future__ import annotations

from typing import Any

import pytest
from control_plane import ApiError
from operator_process import Services
from operator_strategies import document

from quire.operator.spec import parse
from quire.service.errors import ConfigError

Document = dict[str, Any]

HUB = {"hub": {"name": "a/b"}}

# A spec, and of the API server's answer: the field, and what to do about it.
BAD: list[tuple[Document, str, str]] = [
    ({"modle": {}}, ".spec.modle", "field not declared in schema"),
    ({"model": {"hub": {"nam": "a/b"}}}, ".spec.model.hub.nam", "field not declared in schema"),
    ({"replicas": 2}, ".spec.replicas", "field not declared in schema"),
    ({"engine": {"tensorParallel": 2}}, ".spec.engine.tensorParallel", "field not declared in schema"),
    ({"model": {"hub": {}}}, "spec.model.hub.name", "Required value"),
    ({"model": {"claim": {}}}, "spec.model.claim.name", "Required value"),
    ({"model": {"image": {}}}, "spec.model.image.reference", "Required value"),
    ({"model": {**HUB, "cache": {}}}, "spec.model.cache.size", "Required value"),
    ({"model": {"hub": {"name": "gpt2"}}}, "spec.model.hub.name", "write OWNER/NAME, such as Qwen/Qwen3-8B"),
    ({"model": {"hub": {"name": "a b/c"}}}, "spec.model.hub.name", "write OWNER/NAME"),
    ({"model": {"hub": {"name": "https://hub/a/b"}}}, "spec.model.hub.name", "write OWNER/NAME"),
    ({"model": {"hub": {"name": "x"}}}, "spec.model.hub.name", "at least 3 chars long"),
    ({"model": {"hub": {"name": "a/b", "tokenSecret": {"name": "My_Secret"}}}}, "tokenSecret.name", "use lower-case"),
    ({"model": {"hub": {"name": "a/b", "tokenSecret": {"name": "s", "key": "a/b"}}}}, "tokenSecret.key", "use letters"),
    ({"model": {"hub": {"name": "a/b", "revision": "a b"}}}, "spec.model.hub.revision", "such as v1.0"),
    ({"model": {"hub": {"name": "a/b", "tokenSecret": "s"}}}, "spec.model.hub.tokenSecret", "expected map"),
    ({"model": {**HUB, "claim": {"name": "c"}}}, "spec.model", "keep one of hub, claim and image"),
    ({"model": {**HUB, "image": {"reference": "i:1"}}}, "spec.model", "keep one of hub, claim and image"),
    ({"model": {"cache": {"size": "1Gi"}}}, "spec.model", "give model.hub with it, or leave it out"),
    ({"model": {"claim": {"name": "C!"}}}, "spec.model.claim.name", "use lower-case letters"),
    ({"model": {"claim": {"name": "c", "path": "../etc"}}}, "spec.model.claim.path", "relative and without '..'"),
    ({"model": {"claim": {"name": "c", "path": "/abs"}}}, "spec.model.claim.path", "relative and without '..'"),
    ({"model": {"claim": {"name": "c", "path": "a/../../b"}}}, "spec.model.claim.path", "relative and without '..'"),
    ({"model": {"image": {"reference": "no spaces here:1"}}}, "spec.model.image.reference", "REGISTRY/PATH:TAG"),
    ({"model": {"image": {"reference": "i", "pullPolicy": "always"}}}, "pullPolicy", 'supported values: "Always"'),
    ({"model": {**HUB, "cache": {"size": "lots"}}}, "spec.model.cache.size", "such as 50Gi"),
    ({"model": {**HUB, "cache": {"size": "1GB"}}}, "spec.model.cache.size", "such as 50Gi"),
    ({"model": {**HUB, "cache": {"size": 5}}}, "spec.model.cache.size", "expected string"),
    ({"model": {**HUB, "cache": {"size": "1Gi", "accessMode": "RWX"}}}, "accessMode", 'supported values: "ReadWrite'),
    ({"model": {**HUB, "cache": {"size": "1Gi", "storageClass": "Fast SSD"}}}, "storageClass", "use lower-case"),
    ({"model": {"servedNames": ["a b"]}}, "spec.model.servedNames", "use letters, digits"),
    ({"model": {"servedNames": [""]}}, "spec.model.servedNames[0]", "at least 1 chars long"),
    ({"model": {"servedNames": "llama"}}, "spec.model.servedNames", "expected list"),
    ({"engine": {"replicas": -1}}, "spec.engine.replicas", "greater than or equal to 0"),
    ({"engine": {"replicas": 1001}}, "spec.engine.replicas", "less than or equal to 1000"),
    ({"engine": {"replicas": "2"}}, "spec.engine.replicas", "expected numeric"),
    ({"engine": {"replicas": 1.5}}, "spec.engine.replicas", "must be of type integer"),
    ({"engine": {"gpus": 65}}, "spec.engine.gpus", "less than or equal to 64"),
    ({"engine": {"nodes": 2}}, "spec.engine", "set engine.gpus to the number on each node"),
    ({"engine": {"gpus": 8, "nodes": 0}}, "spec.engine.nodes", "greater than or equal to 1"),
    ({"engine": {"gpus": 8, "nodes": 65}}, "spec.engine.nodes", "less than or equal to 64"),
    ({"engine": {"gpus": 2, "extraArgs": ["--tensor-parallel-size=2"]}}, "extraArgs", "gpus and nodes for those of"),
    ({"engine": {"gpus": 2, "extraArgs": ["--master-addr=a"]}}, "spec.engine.extraArgs", "gpus and nodes for those of"),
    ({"engine": {"gpus": -1}}, "spec.engine.gpus", "greater than or equal to 0"),
    ({"engine": {"image": "not an image"}}, "spec.engine.image", "REGISTRY/PATH:TAG"),
    ({"engine": {"image": ""}}, "spec.engine.image", "at least 1 chars long"),
    ({"engine": {"dtype": "int4"}}, "spec.engine.dtype", 'supported values: "auto"'),
    ({"engine": {"maxModelLen": 1}}, "spec.engine.maxModelLen", "greater than or equal to 16"),
    ({"engine": {"kvCache": "8 GB"}}, "spec.engine.kvCache", "such as 8Gi"),
    ({"engine": {"kvCache": "100"}}, "spec.engine.kvCache", "such as 8Gi"),
    ({"engine": {"kvDtype": "fp8"}}, "spec.engine", "set engine.gpus, or leave engine.kvDtype out"),
    ({"engine": {"gpus": 1, "kvDtype": "int8"}}, "spec.engine.kvDtype", 'supported values: "auto", "fp8"'),
    ({"engine": {"gpus": 1, "extraArgs": ["--kv-cache-dtype=fp8"]}}, "spec.engine.extraArgs", "use maxModelLen, dtype"),
    ({"engine": {"speculation": {"enabled": "yes"}}}, "spec.engine.speculation.enabled", "expected boolean"),
    ({"engine": {"speculation": {"tokens": 65}}}, "spec.engine.speculation.tokens", "less than or equal to 64"),
    ({"engine": {"speculation": {"head": "eagle"}}}, "spec", "give model.claim or model.image"),
    (
        {"model": {"claim": {"name": "c"}}, "engine": {"speculation": {"head": "../eagle"}}},
        "spec.engine.speculation.head",
        "write it relative and without '..'",
    ),
    (
        {"model": {"claim": {"name": "c"}}, "engine": {"speculation": {"head": "eagle", "enabled": False}}},
        "spec.engine.speculation",
        "leave the head out, or write enabled: true",
    ),
    ({"engine": {"maxNumSeqs": 0}}, "spec.engine.maxNumSeqs", "greater than or equal to 1"),
    ({"engine": {"loadSeconds": 1}}, "spec.engine.loadSeconds", "greater than or equal to 10"),
    ({"engine": {"drainSeconds": -5}}, "spec.engine.drainSeconds", "greater than or equal to 0"),
    ({"engine": {"surge": -1}}, "spec.engine.surge", "greater than or equal to 0"),
    ({"engine": {"extraArgs": ["max-waiting=4"]}}, "spec.engine.extraArgs", "write FLAG=VALUE in one entry"),
    ({"engine": {"extraArgs": ["--listen=0.0.0.0:1"]}}, "spec.engine.extraArgs", "leave out --listen"),
    ({"engine": {"extraArgs": ["--dtype=float32"]}}, "spec.engine.extraArgs", "use maxModelLen, dtype"),
    ({"engine": {"extraArgs": ["--model"]}}, "spec.engine.extraArgs", "sets a flag that the operator sets"),
    ({"engine": {"extraArgs": ["--tls-cert=/a"]}}, "spec.engine.extraArgs", "name a Secret in spec.tls.secret"),
    ({"engine": {"resources": {"limits": {"cpu": "two"}}}}, "spec.engine.resources.limits", "such as 2, 500m, 16Gi"),
    ({"engine": {"resources": {"requests": {"memory": "16GB"}}}}, "resources.requests", "such as 2, 500m, 16Gi"),
    ({"engine": {"resources": {"limits": {"cpu": -1}}}}, "spec.engine.resources.limits", "needs quantities"),
    ({"engine": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}, "spec.engine.resources", "set engine.gpus instead"),
    ({"engine": {"nodeSelector": {"gpu": True}}}, "spec.engine.nodeSelector.gpu", "expected string"),
    ({"engine": {"tolerations": [{"operator": "Exists", "value": "x", "key": "a"}]}}, "tolerations[0]", "has no value"),
    ({"engine": {"tolerations": [{"value": "x"}]}}, "spec.engine.tolerations[0]", "needs operator: Exists"),
    ({"engine": {"tolerations": [{"key": "a", "effect": "Never"}]}}, "effect", 'supported values: "NoExecute"'),
    ({"engine": {"autoscaling": {}}}, "spec.engine.autoscaling.maxReplicas", "Required value"),
    ({"engine": {"autoscaling": {"maxReplicas": 0}}}, "autoscaling.maxReplicas", "greater than or equal to 1"),
    ({"engine": {"autoscaling": {"minReplicas": 3, "maxReplicas": 2}}}, "spec.engine.autoscaling", "raise maxReplicas"),
    (
        {"engine": {"autoscaling": {"maxReplicas": 2, "targets": {"pageUsePercent": 100}}}},
        "autoscaling.targets.pageUsePercent",
        "less than or equal to 95",
    ),
    ({"router": {"replicas": 0}}, "spec.router.replicas", "greater than or equal to 1"),
    ({"router": {"holdSeconds": -1}}, "spec.router.holdSeconds", "greater than or equal to 0"),
    ({"router": {"image": ":tag"}}, "spec.router.image", "REGISTRY/PATH:TAG"),
    ({"gateway": {"replicas": 0}}, "spec.gateway.replicas", "greater than or equal to 1"),
    ({"gateway": {"serviceType": "loadBalancer"}}, "spec.gateway.serviceType", 'supported values: "ClusterIP"'),
    ({"gateway": {"apiKeys": {"key": "k"}}}, "spec.gateway.apiKeys.name", "Required value"),
    ({"gateway": {"tlsSecret": "My Cert"}}, "spec.gateway.tlsSecret", "use lower-case letters"),
    ({"tls": {}}, "spec.tls.secret", "Required value"),
    ({"tls": {"secret": "My Cert"}}, "spec.tls.secret", "use lower-case letters"),
    ({"observability": {"otlpEndpoint": "collector:4317"}}, "observability.otlpEndpoint", "http://HOST:PORT"),
    ({"gateway": {"ingress": {}}}, "spec.gateway.ingress.host", "Required value"),
    ({"gateway": {"ingress": {"host": "https://a"}}}, "spec.gateway.ingress.host", "write a DNS name, such as"),
    ({"gateway": {"ingress": {"host": "a", "className": "N X"}}}, "ingress.className", "use lower-case letters"),
    ({"gateway": {"ingress": {"host": "a"}, "tlsSecret": "c"}}, "spec.gateway", "leave gateway.tlsSecret out"),
    ({"gateway": {"httpRoute": {}}}, "spec.gateway.httpRoute.gateways", "Required value"),
    ({"gateway": {"httpRoute": {"gateways": []}}}, "spec.gateway.httpRoute.gateways", "at least 1 items"),
    ({"gateway": {"httpRoute": {"gateways": [{"name": "A"}]}}}, "gateways[0].name", "use lower-case letters"),
    (
        {"gateway": {"httpRoute": {"gateways": [{"name": "a"}], "hostnames": ["a b"]}}},
        "spec.gateway.httpRoute.hostnames",
        "such as llm.example or *.example",
    ),
    ({"observability": {"podMonitor": {"intervalSeconds": 0}}}, "podMonitor.intervalSeconds", "greater than or equal"),
    ({"observability": {"podMonitor": True}}, "spec.observability.podMonitor", "expected map"),
    ({"observability": {"logLevel": "verbose"}}, "spec.observability.logLevel", 'supported values: "debug"'),
    ({"rollout": {"canary": {"weights": []}}}, "spec.rollout.canary.weights", "at least 1 items"),
    ({"rollout": {"canary": {"weights": [50, 10]}}}, "spec.rollout.canary.weights", "in rising order, such as [5, 25"),
    ({"rollout": {"canary": {"weights": [100]}}}, "spec.rollout.canary.weights[0]", "less than or equal to 99"),
    ({"rollout": {"canary": {"weights": 10}}}, "spec.rollout.canary.weights", "expected list"),
    ({"rollout": {"canary": {"intervalSeconds": 0}}}, "canary.intervalSeconds", "greater than or equal to 1"),
    ({"rollout": {"canary": {"maxErrorPercent": 101}}}, "canary.maxErrorPercent", "less than or equal to 100"),
    ({"imagePullSecrets": ["A"]}, "spec.imagePullSecrets", "use lower-case letters"),
    ({"imagePullSecrets": [{"name": "a"}]}, "spec.imagePullSecrets[0]", "expected string"),
]  # fmt: skip


def test_the_api_server_refuses_them_with_the_field_and_the_fix(services: Services) -> None:
    """What gets in is a service that never comes up, and a person who looks for the reason."""
    assert len(BAD) >= 40
    wrong = []
    for spec, field, fix in BAD:
        try:
            services.apply("demo", spec, dryRun="All")
            wrong.append((spec, "was taken"))
        except ApiError as error:
            if field not in error.message or fix not in error.message:
                wrong.append((spec, error.message))
    assert not wrong, "\n".join(f"{spec}: {said}" for spec, said in wrong)


@pytest.mark.parametrize(("spec", "field", "fix"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_render_refuses_them_too(spec: Document, field: str, fix: str) -> None:
    """The same rules in CEL and in Python: who renders in CI must not learn of a fault only in the cluster."""
    with pytest.raises(ConfigError) as refused:
        parse(document(spec))
    assert refused.value.field.startswith("spec")


@pytest.mark.parametrize("name", ["Demo", "1demo", "demo.two", "a" * 51, "demo-"])
def test_names_that_make_no_dns_labels(name: str, services: Services) -> None:
    """The API server takes more as an object's name than as a Service's."""
    with pytest.raises(ApiError, match=r"metadata\.name"):
        services.apply(name, {}, dryRun="All")
    with pytest.raises(ConfigError, match=r"metadata\.name becomes a part of DNS names"):
        parse(document({}, name=name))
