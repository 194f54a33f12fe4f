"""What services become: golden files, Kubernetes' own schemas, and what holds of every service."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_strategies import document, services

from quire.cli.main import main
from quire.operator import names
from quire.operator.config import Images
from quire.operator.core import changes, children
from quire.operator.kinds import CHILD_OF, OPTIONAL
from quire.operator.observed import Observed, key_of
from quire.operator.resources.group import templates
from quire.operator.spec import InferenceService, parse

ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "manifests/samples").glob("*.yaml"))
KUBERNETES = "1.36"
IMAGES = Images()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_samples_become_what_the_golden_files_say(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A change of what runs in clusters must be seen in review."""
    golden = Path(__file__).parent / "golden" / sample.name
    assert main(["manifests", "render", str(sample)]) == 0
    rendered = capsys.readouterr().out
    assert rendered == golden.read_text(), (
        f"if it is meant: quire manifests render manifests/samples/{sample.name} > tests/operator/golden/{sample.name}"
    )


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_everything_rendered_is_valid_and_known_to_kubernetes(sample: Path) -> None:
    """Strict: a misspelt field would be dropped by the API server, and a probe with it."""
    for child in yaml.safe_load_all((Path(__file__).parent / "golden" / sample.name).read_text()):
        assert_is_known(child)


def assert_is_known(child: dict[str, Any]) -> None:
    """Kinds of other projects have no schemas here, but the pods in them do."""
    if CHILD_OF[child["kind"]] not in OPTIONAL:
        kubernetes_validate.validate(child, KUBERNETES, strict=True)
    for template in pod_templates(child):
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes_validate.validate(wrapped, KUBERNETES, strict=True)


def pod_templates(child: dict[str, Any]) -> list[dict[str, Any]]:
    """What its pods are made of, if it makes any."""
    return templates(child) if child["kind"] in ("Deployment", "LeaderWorkerSet") else []


@settings(max_examples=25, deadline=None)
@given(service=services)
def test_every_service_becomes_valid_objects_of_its_own(service: InferenceService) -> None:
    """Names that clash, labels that are too long or a child without an owner break a service in the cluster only."""
    made = children(service, IMAGES)
    assert len({key_of(each) for each in made}) == len(made)
    for child in made:
        assert_is_known(child)
        metadata = child["metadata"]
        assert len(metadata["name"]) <= 63
        assert metadata["labels"][names.SERVICE] == service.name
        assert [owner["uid"] for owner in metadata["ownerReferences"]] == [service.uid]


@settings(max_examples=50, deadline=None)
@given(service=services)
def test_selectors_choose_their_own_pods_and_no_others(service: InferenceService) -> None:
    """A selector that is too wide sends gateways' requests to engines."""
    made = children(service, IMAGES)
    pods = [template["metadata"]["labels"] for each in made for template in pod_templates(each)]
    assert len(pods) == (4 if service.spans_nodes else 3)
    for child in made:
        spec, name = child.get("spec", {}), child["metadata"]["name"]
        chosen = {
            "Service": lambda spec: {"matchLabels": spec["selector"]},
            "Deployment": lambda spec: spec["selector"],
            "PodDisruptionBudget": lambda spec: spec["selector"],
            "NetworkPolicy": lambda spec: spec["podSelector"],
        }.get(child["kind"])
        if chosen:
            picked = [f"demo-{labels[names.COMPONENT]}" for labels in pods if is_picked(labels, chosen(spec))]
            # Whichever pod of a group goes takes its engine along.
            is_whole = child["kind"] == "PodDisruptionBudget" and name == "demo-engine" and service.spans_nodes
            assert picked == [name, *(["demo-engine-worker"] if is_whole else [])]


def is_picked(labels: dict[str, str], selector: dict[str, Any]) -> bool:
    """By labels, and by the one operator that is in use."""
    either = selector.get("matchExpressions", [])
    return selector["matchLabels"].items() <= labels.items() and all(
        each["operator"] == "In" and labels[each["key"]] in each["values"] for each in either
    )


@settings(max_examples=50, deadline=None)
@given(service=services)
def test_containers_mount_and_refer_to_what_is_there(service: InferenceService) -> None:
    """A mount without its volume is refused only when the pods are made, long after the apply."""
    made = children(service, IMAGES)
    own = {key_of(each) for each in made}
    for template in (template for child in made for template in pod_templates(child)):
        pod = template["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert ("ServiceAccount", pod["serviceAccountName"]) in own
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert len(set(paths)) == len(paths)
            for source in container["envFrom"]:
                assert ("ConfigMap", source["configMapRef"]["name"]) in own


def as_api_server_keeps(child: dict[str, Any]) -> dict[str, Any]:
    """`child` as it is read back: with fields that the API server fills in."""
    live = copy.deepcopy(child)
    live["metadata"] |= {"uid": "x", "resourceVersion": "7", "generation": 1, "managedFields": []}
    live["status"] = {}
    for template in pod_templates(live):
        template["spec"] |= {"dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler"}
        for container in template["spec"]["containers"]:
            container["terminationMessagePath"] = "/dev/termination-log"
    return live


@settings(max_examples=50, deadline=None)
@given(service=services)
def test_a_second_look_changes_nothing(service: InferenceService) -> None:
    """Without this an operator writes for ever, and every write wakes every watcher."""
    live = tuple(as_api_server_keeps(each) for each in children(service, IMAGES))
    found = changes(service, Observed(children=live), IMAGES)
    assert (found.apply, found.delete) == ((), ())


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for key, each in value.items() for leaf in leaves(each, (*path, key))]
    if isinstance(value, list):
        return [leaf for index, each in enumerate(value) for leaf in leaves(each, (*path, index))]
    return [path]


@settings(max_examples=200, deadline=None)
@given(service=services, data=st.data())
def test_any_edit_by_hand_is_seen(service: InferenceService, data: st.DataObject) -> None:
    """Whatever leaf of whatever child somebody changes or removes, that child is applied again, and only that."""
    live = [as_api_server_keeps(each) for each in children(service, IMAGES)]
    index = data.draw(st.integers(0, len(live) - 1))
    wanted = children(service, IMAGES)[index]
    path = data.draw(
        st.sampled_from(
            [each for each in leaves(wanted) if each[0] not in ("apiVersion", "kind") and each[-1] != "name"]
        )
    )
    *way, last = path
    place = live[index]
    for step in way:
        place = place[step]
    if data.draw(st.booleans()):
        place[last] = 12345 if place[last] != 12345 else 54321
    else:
        del place[last]
    found = changes(service, Observed(children=tuple(live)), IMAGES)
    assert [key_of(each) for each in found.apply] == [key_of(wanted)]


def test_a_field_that_is_no_longer_asked_for_is_dropped() -> None:
    """Its absence from what is asked for shows in no comparison of fields, only in the hash."""
    with_selector = parse(document({"engine": {"nodeSelector": {"disk": "ssd"}}}))
    live = tuple(as_api_server_keeps(each) for each in children(with_selector, IMAGES))
    found = changes(parse(document({})), Observed(children=live), IMAGES)
    assert [key_of(each) for each in found.apply] == [("Deployment", "demo-engine")]


def test_a_child_that_is_no_longer_wanted_goes_and_others_stay() -> None:
    """A cache that was taken out of the spec would cost its volume for ever; somebody else's object is not ours."""
    cached = parse(document({"model": {"hub": {"name": "a/b"}, "cache": {"size": "1Gi"}}}))
    live = [as_api_server_keeps(each) for each in children(cached, IMAGES)]
    foreign = copy.deepcopy(next(each for each in live if each["kind"] == "PersistentVolumeClaim"))
    foreign["metadata"] |= {"name": "theirs", "ownerReferences": []}
    found = changes(parse(document({"model": {"hub": {"name": "a/b"}}})), Observed((*live, foreign)), IMAGES)
    assert [key_of(each) for each in found.delete] == [("PersistentVolumeClaim", "demo-model-cache")]


def test_changed_environment_rolls_all_pods() -> None:
    """A running process never sees a changed ConfigMap."""
    before = children(parse(document({})), IMAGES)
    after = children(parse(document({"observability": {"otlpEndpoint": "http://c:4317"}})), IMAGES)
    templates = [
        [each["spec"]["template"] for each in made if each["kind"] == "Deployment"] for made in (before, after)
    ]
    assert len(templates[0]) == 3
    assert all(old != new for old, new in zip(*templates, strict=True))


def test_quantities_are_compared_by_value() -> None:
    """The API server writes 1000m of memory its own way; that is no edit."""
    service = parse(document({"engine": {"resources": {"limits": {"cpu": "1000m", "memory": "1024Mi"}}}}))
    live = [as_api_server_keeps(each) for each in children(service, IMAGES)]
    engine = next(each for each in live if each["metadata"]["name"] == "demo-engine" and each["kind"] == "Deployment")
    limits = engine["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    limits |= {"cpu": "1", "memory": "1Gi"}
    assert changes(service, Observed(tuple(live)), IMAGES).apply == ()
    limits["cpu"] = "2"
    assert len(changes(service, Observed(tuple(live)), IMAGES).apply) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "it is not YAML"),
        ("kind: Pod", "there is no InferenceService of quire.dev/v1alpha1 in it"),
        ("apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService", "there is no InferenceService of quire.dev"),
        (
            "apiVersion: quire.dev/v1alpha1\nkind: InferenceService\nmetadata: {name: A}",
            "at most 50 lower-case letters",
        ),
    ],
)
def test_render_says_what_it_wants(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """KServe's kind of the same name is the likeliest mistake."""
    file = tmp_path / "service.yaml"
    file.write_text(text)
    assert main(["manifests", "render", str(file)]) == 2
    assert said in capsys.readouterr().err


@settings(max_examples=30, deadline=None)
@given(service=services)
def test_every_flag_is_one_that_the_service_knows(service: InferenceService) -> None:
    """The services' own parsers read what their containers are started with; a flag that is gone is a crash loop."""
    assert_flags_are_known(service)


def parser_of(module: str) -> Any:
    main = importlib.import_module(f"{module}.__main__")
    return getattr(main, "build_parser", None) or main._parser


def assert_flags_are_known(service: InferenceService) -> None:
    injected = {"$(LWS_WORKER_INDEX)": "1", "$(LWS_LEADER_ADDRESS)": "demo-engine-0.demo-engine-0.models"}
    for template in (template for child in children(service, IMAGES) for template in pod_templates(child)):
        pod = template["spec"]
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            words = container["args"]
            for name, value in injected.items():
                words = [word.replace(name, value) for word in words]
            module = container["command"][-1]
            main = importlib.import_module(f"{module}.__main__")
            build = getattr(main, "build_config", None) or main._config
            build(parser_of(module)().parse_args(words))
