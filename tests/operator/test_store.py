"""The store is what the watches' news, the operator's own writes and lists come to, in whatever order they arrive."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from quire.operator import names
from quire.operator.kinds import CHILD_OF, POD, SERVICE
from quire.operator.spec import Key
from quire.operator.store import Store

Document = dict[str, Any]

CONFIG = CHILD_OF["ConfigMap"]
DEMO = Key("n", "demo")


def thing(name: str, version: int, service: str = "demo") -> Document:
    metadata = {"namespace": "n", "name": name, "resourceVersion": str(version), "labels": {names.SERVICE: service}}
    return {"metadata": metadata, "spec": {"version": version}}


def state(store: Store) -> set[tuple[str, str]]:
    return {(each["metadata"]["name"], each["metadata"]["resourceVersion"]) for each in store.children(DEMO)}


@given(st.data())
def test_news_in_any_order_comes_to_what_there_is(data: st.DataObject) -> None:
    """Watch, write and list race: an old word must not bring back what is gone, nor hide what has come since."""
    version, truth = 100, dict[str, int]()
    news: list[tuple[str, Any]] = []
    for _ in range(data.draw(st.integers(1, 15))):
        version += 1
        name = data.draw(st.sampled_from("abc"))
        if name in truth and data.draw(st.booleans()):
            del truth[name]
            # The watch says so, sooner or later; an answer to a write may be on its way, too.
            news.append(("gone", thing(name, version)))
        else:
            truth[name] = version
            news.append(("is", thing(name, version)))
            if data.draw(st.booleans()):
                news.append(("is", thing(name, version)))
        if data.draw(st.booleans()):
            news.append(("list", ([thing(each, at) for each, at in truth.items()], version)))
    store = Store()
    for what, told in data.draw(st.permutations(news)):
        if what == "list":
            store.replace(CONFIG, *told)
        else:
            store.hear(CONFIG, told, is_gone=what == "gone")
    assert state(store) == {(name, str(at)) for name, at in truth.items()}


def test_a_list_tells_what_has_gone_unnoticed() -> None:
    """A watch that begins anew does not: without this a deleted Service would never be made again."""
    store = Store()
    store.put(CONFIG, thing("a", 5))
    store.put(CONFIG, thing("b", 6))
    store.put(CONFIG, thing("c", 6, service="other"))
    assert store.replace(CONFIG, [thing("b", 6), thing("c", 6, service="other")], 9) == {DEMO}
    assert state(store) == {("b", "6")}
    assert store.replace(CONFIG, [thing("b", 6), thing("c", 6, service="other")], 10) == set()


def test_own_writes_are_no_news() -> None:
    """Else each write would wake the one who wrote."""
    store = Store()
    store.put(CONFIG, thing("a", 5))
    assert store.hear(CONFIG, thing("a", 5), is_gone=False) is None
    assert store.hear(CONFIG, thing("a", 6), is_gone=False) == DEMO


def test_what_others_did_before_a_write_is_seen_in_its_answer() -> None:
    """Watches and lists tell of it later, and by then it is no news: nobody would look at an edit till the next."""
    store = Store()
    metadata = {"namespace": "n", "name": "demo", "managedFields": [{"manager": "kubectl"}]}
    before: Document = {"metadata": {**metadata, "resourceVersion": "1"}, "spec": {"a": 1}}
    store.hear(SERVICE, before, is_gone=False)
    ours = {**before, "metadata": {**metadata, "resourceVersion": "2"}, "status": {"ready": True}}
    assert not store.written(SERVICE, ours)
    theirs = {**ours, "metadata": {**metadata, "resourceVersion": "4"}, "spec": {"a": 2}}
    assert store.written(SERVICE, theirs)
    assert store.hear(SERVICE, theirs, is_gone=False) is None

    assert not store.written(CONFIG, thing("a", 5))
    assert not store.written(CONFIG, {**thing("a", 6), "data": {"ours": "too"}})
    assert store.written(CONFIG, {**thing("a", 8), "status": {"theirs": 1}})


def test_a_service_is_its_own() -> None:
    """It has no label of ours, and its children are not itself."""
    store = Store()
    service = {"metadata": {"namespace": "n", "name": "demo", "resourceVersion": "1"}}
    assert store.hear(SERVICE, service, is_gone=False) == DEMO
    store.put(POD, thing("p", 2))
    assert store.children(DEMO) == ()
    assert [each["metadata"]["name"] for each in store.pods(DEMO)] == ["p"]
    assert store.service(DEMO) is not None
    store.hear(SERVICE, service, is_gone=True)
    assert store.service(DEMO) is None


def test_a_label_that_changes_moves_the_object() -> None:
    """Somebody gives a child to another service by hand: the one must make it anew, the other take it out."""
    store = Store()
    store.put(CONFIG, thing("a", 1))
    store.put(CONFIG, thing("a", 2, service="other"))
    assert state(store) == set()
    assert len(store.children(Key("n", "other"))) == 1
