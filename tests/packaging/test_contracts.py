"""Lints the contracts' descriptors: names that a reader of any .proto expects, and nothing undocumented."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import EnumDescriptor, FileDescriptor

from quire.v1 import drafting_pb2, engine_pb2, grammar_pb2, inference_pb2, request_pb2, session_pb2

ROOT = Path(__file__).parents[2]
FILES = [
    module.DESCRIPTOR for module in (drafting_pb2, engine_pb2, grammar_pb2, inference_pb2, request_pb2, session_pb2)
]


@pytest.fixture(params=FILES, ids=lambda file: Path(file.name).stem)
def file(request: pytest.FixtureRequest) -> FileDescriptor:
    return request.param


def test_every_contract_is_listed_here() -> None:
    """A contract that is not in FILES would escape the lint."""
    on_disk = {str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos").glob("quire/**/*.proto")}
    assert on_disk == {file.name for file in FILES}


def test_the_package_is_the_folder_and_has_a_version(file: FileDescriptor) -> None:
    """protoc derives Python's imports from the path: a package that differs breaks reflection clients."""
    assert file.package == str(Path(file.name).parent).replace("/", ".")
    assert re.fullmatch(r"quire\.v\d+", file.package)


def test_services_and_their_messages_are_named_after_them(file: FileDescriptor) -> None:
    """A method's own request and response can grow without changing another method's."""
    for service in file.services_by_name.values():
        assert service.name.endswith("Service")
        for method in service.methods:
            assert method.input_type.name == f"{method.name}Request", method.full_name
            assert method.output_type.name == f"{method.name}Response", method.full_name
            assert method.input_type.file is file and method.output_type.file is file


def test_enums_start_with_unspecified_and_carry_their_name(file: FileDescriptor) -> None:
    """Zero is what a missing field reads as: it must not mean anything."""
    for enum in enums(file):
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
        assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
        assert all(value.name.startswith(f"{prefix}_") for value in enum.values)


def test_names_are_in_the_usual_case(file: FileDescriptor) -> None:
    """Generated code in other languages derives its names from these."""
    for message in file.message_types_by_name.values():
        assert re.fullmatch(r"([A-Z][a-z0-9]*)+", message.name)
        for field in message.fields:
            assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name), field.full_name


def test_required_scalars_can_be_told_from_missing_ones() -> None:
    """The contract says that a missing field is an error, which needs presence in what an engine is sent."""
    for message in (request_pb2.Request, request_pb2.SamplingParams, request_pb2.StopConditions):
        for field in message.DESCRIPTOR.fields:
            assert field.is_repeated or field.has_presence, field.full_name


def test_every_file_says_what_it_is_for() -> None:
    """The contracts are what someone who writes another service reads first."""
    for file in FILES:
        assert (ROOT / "protos" / file.name).read_text().startswith("// "), file.name


def enums(file: FileDescriptor) -> Iterator[EnumDescriptor]:
    yield from file.enum_types_by_name.values()
    for message in file.message_types_by_name.values():
        yield from message.enum_types
