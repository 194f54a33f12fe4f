"""How a change of the engines is tried: what is judged, what there is meanwhile, how it ends, on clusters of paper."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import kubernetes_validate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_strategies import document, services
from paper_cluster import Paper

from quire.operator.canary import Judgement, Tally, Trial, counted, judge
from quire.operator.revision import Revision
from quire.operator.rollout_spec import Canary
from quire.operator.spec import InferenceService, parse

Document = dict[str, Any]

policies = st.builds(
    Canary,
    weights=st.lists(st.integers(1, 99), min_size=1, max_size=4).map(lambda weights: tuple(sorted(weights))),
    interval_seconds=st.integers(1, 600),
    min_requests=st.integers(0, 40),
    max_error_percent=st.integers(0, 99),
)
tallies = st.tuples(st.integers(0, 500), st.integers(0, 500)).map(lambda pair: Tally(max(pair), min(pair)))


@given(policy=policies, new=tallies, others=tallies, seconds=st.floats(0, 1200))
def test_a_judgement_has_its_grounds(policy: Canary, new: Tally, others: Tally, seconds: float) -> None:
    """Promoted with too few requests, or rolled back by a few of few, a canary is worth nothing."""
    found = judge(policy, Trial(new, others), seconds)
    limit = policy.max_error_percent / 100
    if found is Judgement.ADVANCE:
        assert seconds >= policy.interval_seconds
        assert new.requests >= policy.min_requests
        assert new.share <= limit
    if found is Judgement.ROLL_BACK:
        assert new.share > limit
        assert new.share > others.share
        # Also if all that are still missing went well.
        assert new.failed > limit * policy.min_requests


def test_failures_that_all_engines_have_roll_nothing_back() -> None:
    """Too much load fails everywhere: the new engines are no worse, and nothing is promoted on such grounds either."""
    policy = Canary(max_error_percent=5, min_requests=10, interval_seconds=60)
    assert judge(policy, Trial(Tally(100, 30), Tally(900, 300)), 600) is Judgement.WAIT
    assert judge(policy, Trial(Tally(100, 40), Tally(900, 300)), 1) is Judgement.ROLL_BACK


def test_counts_are_of_the_time_between() -> None:
    """A router that starts anew counts from zero; one that did not answer is counted when it does again."""
    before = {"a": {("", "ok"): 90.0, ("r2", "failed"): 2.0}, "b": {("", "ok"): 5.0}}
    now = {"a": {("", "ok"): 95.0, ("r2", "failed"): 5.0, ("r2", "ok"): 1.0}, "c": {("r2", "ok"): 7.0}}
    assert counted(before, now) == {"": Tally(5, 0), "r2": Tally(3 + 1 + 7, 3)}
    assert counted({"a": {("", "ok"): 90.0}}, {"a": {("", "ok"): 4.0}}) == {"": Tally(4, 0)}


@given(services)
def test_a_revision_is_read_as_it_was_written(service: InferenceService) -> None:
    """Else a canary's other engines would become something that nobody ever asked for."""
    revision = Revision.of(service)
    assert Revision.read(revision.text) == revision
    assert revision.within(service) == service
    for other in ("", "{", "[]", '{"engine":{"replicas":"x"}}'):
        assert Revision.read(other) is None


def spec_of(flag: str, replicas: int = 4, **canary: Any) -> Document:
    settings = {"weights": [10, 50], "intervalSeconds": 60, "minRequests": 10, "maxErrorPercent": 5, **canary}
    return {"engine": {"replicas": replicas, "extraArgs": [flag]}, "rollout": {"canary": settings}}


OLD, NEW = spec_of("--max-waiting=1"), spec_of("--max-waiting=2")
GOOD, BAD = Trial(Tally(50, 0), Tally(450, 0)), Trial(Tally(50, 10), Tally(450, 0))


def test_a_change_is_tried_step_by_step_and_then_made() -> None:
    """New engines get their share only once they are ready, for their time, and then all engines become new."""
    paper = Paper()
    paper.look(OLD)
    paper.look(OLD)
    assert len(paper.children) == 18
    assert not [name for _, name in paper.children if "canary" in name]
    assert "--engines=kubernetes:models/demo-engine+demo-canary:grpc" in paper.arguments("demo-router")

    paper.is_ready = False
    paper.look(NEW)
    assert (paper.children["Deployment", "demo-canary"]["spec"]["replicas"], paper.status["rollout"]["weight"]) == (
        1,
        0,
    )
    assert "--max-waiting=2" in paper.arguments("demo-canary")
    assert "--max-waiting=1" in paper.arguments("demo-engine")
    assert paper.percent == "0"
    for child in paper.children.values():
        kubernetes_validate.validate(child, "1.36")
    assert paper.condition("Progressing")["message"].endswith("start beside the others")
    assert [each["reason"] for each in paper.told] == ["Canary"]

    paper.finish_start()
    assert paper.look(NEW).look_again == 60
    assert paper.percent == "10"
    paper.now += timedelta(seconds=59)
    assert paper.look(NEW, GOOD).look_again == 1
    assert paper.status["rollout"]["step"] == 0
    paper.now += timedelta(seconds=1)
    paper.look(NEW, GOOD)
    # The second step needs more of them first: until then the first one's share holds.
    assert paper.status["rollout"]["step"] == 1
    assert paper.children["Deployment", "demo-canary"]["spec"]["replicas"] == 2
    assert paper.status["rollout"]["weight"] == 10
    paper.look(NEW)
    assert paper.status["rollout"]["weight"] == 50
    paper.now += timedelta(seconds=60)
    # Without enough requests it goes on, however long that takes.
    assert paper.look(NEW, Trial(Tally(9, 0), Tally(9, 0))).canary is not None
    paper.look(NEW, GOOD)
    assert "--max-waiting=2" in paper.arguments("demo-engine")
    assert len(paper.children) == 18
    assert paper.status.get("rollout") is None
    paper.look(NEW)
    assert paper.condition("Progressing")["reason"] == "Settled"


def tried(trial_of: Document = NEW) -> Paper:
    """With new engines on trial, which get requests."""
    paper = Paper()
    for spec in (OLD, trial_of, trial_of):
        paper.look(spec)
    assert paper.status["rollout"]["weight"] == 10
    return paper


def is_as_before(paper: Paper) -> bool:
    return len(paper.children) == 18 and "--max-waiting=1" in paper.arguments("demo-engine")


def test_too_many_failures_roll_it_back_and_it_stays_so() -> None:
    """A person must learn why and what to do; the next change is tried again, the old one is no change."""
    paper = tried()
    paper.look(NEW, BAD)
    assert is_as_before(paper)
    said = paper.condition("Degraded")
    assert said["reason"] == "CanaryRolledBack"
    assert (
        "10 of 50 requests failed on them, more than spec.rollout.canary.maxErrorPercent (5) allows" in said["message"]
    )
    assert "correct spec.engine" in said["message"]
    assert {(each["type"], each["reason"]) for each in paper.told} >= {("Warning", "CanaryRolledBack")}
    for _ in range(3):
        paper.now += timedelta(days=1)
        paper.look(NEW, GOOD)
        assert is_as_before(paper)
        assert paper.told == []
    paper.look(spec_of("--max-waiting=3"))
    assert "--max-waiting=3" in paper.arguments("demo-canary")
    assert paper.condition("Degraded")["status"] == "False"
    paper.look(OLD)
    assert is_as_before(paper)
    assert paper.status.get("rollout") is None


def canary_pod(paper: Paper, container: Document) -> Document:
    labels = paper.children["Deployment", "demo-canary"]["spec"]["template"]["metadata"]["labels"]
    metadata = {"name": "p", "namespace": "models", "labels": labels}
    return {"kind": "Pod", "metadata": metadata, "status": {"containerStatuses": [{"name": "engine", **container}]}}


def test_new_engines_that_can_not_run_are_rolled_back() -> None:
    """They never get a request that could fail. What a canary before them left behind says nothing about them."""
    paper = Paper(is_ready=False)
    paper.look(OLD)
    paper.look(NEW)
    paper.pods = (canary_pod(paper, {"lastState": {"terminated": {"exitCode": 2, "message": "no such flag"}}}),)
    other = spec_of("--max-waiting=3")
    paper.look(other)
    assert paper.status["rollout"]["phase"] == "Canary"
    paper.look(NEW)
    assert is_as_before(paper)
    assert "the engine can't run the model: no such flag" in paper.condition("Degraded")["message"]


def test_new_engines_that_are_never_ready_are_rolled_back() -> None:
    """No node has room for them, say: that is told meanwhile, and a deadline ends it."""
    paper = Paper(is_ready=False)
    paper.look(OLD)
    paper.look(NEW)
    paper.pods = (canary_pod(paper, {"state": {"waiting": {"reason": "ErrImagePull"}}}),)
    paper.look(NEW)
    assert (paper.status["rollout"]["phase"], paper.condition("Degraded")["reason"]) == ("Canary", "ImagePullFailed")
    paper.now += timedelta(seconds=1800)
    assert paper.look(NEW).look_again == 60
    paper.now += timedelta(seconds=60)
    paper.look(NEW)
    assert is_as_before(paper)
    assert "not ready within spec.engine.loadSeconds (1800)" in paper.condition("Degraded")["message"]


def test_where_nobody_asks_no_new_engine_is_late() -> None:
    """A service asleep for a night would have rolled back a change that nothing is wrong with."""
    paper = Paper(is_ready=False)
    for spec in (spec_of("--max-waiting=1", 0), spec_of("--max-waiting=2", 0)):
        paper.look(spec)
    for replicas in (0, 1):
        paper.now += timedelta(days=1)
        paper.look(spec_of("--max-waiting=2", replicas))
        assert paper.status["rollout"]["phase"] == "Canary"


@pytest.mark.parametrize(
    "spec",
    [
        {**NEW, "rollout": {}},
        {**NEW, "model": {"hub": {"name": "a/b"}}},
        {**OLD, "observability": {"logLevel": "debug"}},
        {**OLD, "engine": {**OLD["engine"], "surge": 0, "replicas": 2}},
    ],
    ids=["no canary", "another model", "not the engines' own", "no other pods"],
)
def test_what_is_not_tried_is_made_at_once(spec: Document) -> None:
    """A gateway has one model's tokenizer; what pods are not made of needs no trial."""
    paper = tried()
    paper.look(spec)
    assert len(paper.children) == 18
    assert paper.status.get("rollout") is None
    engine = paper.children["Deployment", "demo-engine"]
    assert Revision.read(engine["metadata"]["annotations"]["quire.dev/made-of"]) == Revision.of(parse(document(spec)))


@pytest.mark.parametrize("replicas", [0, 1, 7, 10, 11])
def test_there_are_as_many_new_engines_as_their_share_needs(replicas: int) -> None:
    """One at least, or the share could not be served; none where nobody asks."""
    paper = Paper()
    for flag in ("--max-waiting=1", "--max-waiting=2"):
        paper.look(spec_of(flag, replicas))
    wanted = {0: 0, 1: 1, 7: 1, 10: 1, 11: 2}[replicas]
    assert paper.children["Deployment", "demo-canary"]["spec"]["replicas"] == wanted


@settings(max_examples=25, deadline=None)
@given(
    policy=policies,
    failing=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    others_failing=st.sampled_from([0.0, 0.01]),
    traffic=st.integers(0, 60),
    interval=st.integers(15, 120),
)
def test_however_it_goes_it_ends_as_it_should(
    policy: Canary, failing: float, others_failing: float, traffic: int, interval: int
) -> None:
    """Good engines are promoted and bad ones are not, whatever the policy, the load and the time between two looks."""
    canary = {
        "weights": list(policy.weights), "intervalSeconds": policy.interval_seconds,
        "minRequests": policy.min_requests, "maxErrorPercent": policy.max_error_percent,
    }  # fmt: skip
    old, new = (spec_of(flag, **canary) for flag in ("--max-waiting=1", "--max-waiting=2"))
    paper, trial, weights = Paper(), Trial(), [0]
    paper.look(old)
    began = paper.now
    for _ in range(4 * len(policy.weights) * (2 + policy.interval_seconds // interval + policy.min_requests)):
        before = paper.status.get("rollout")
        paper.look(new, trial)
        if paper.status.get("rollout") != before:
            trial = Trial()
        rollout = paper.status.get("rollout")
        if rollout is None or rollout["phase"] == "RolledBack":
            break
        assert "--max-waiting=1" in paper.arguments("demo-engine")
        weights.append(rollout["weight"])
        paper.now += timedelta(seconds=interval)
        counts = {"": Tally(100, round(100 * others_failing)), rollout["revision"]: Tally(traffic, traffic * failing)}
        trial = trial.plus(counts, rollout["revision"])
    assert weights == sorted(weights)
    is_promoted = "--max-waiting=2" in paper.arguments("demo-engine")
    limit = policy.max_error_percent / 100
    if not traffic:
        assert is_promoted is (policy.min_requests == 0)
    elif failing <= limit:
        assert is_promoted
        assert (paper.now - began).total_seconds() >= len(policy.weights) * policy.interval_seconds
    else:
        assert not is_promoted
        assert paper.status["rollout"]["phase"] == "RolledBack"
    assert len(paper.children) == 18 or not traffic
