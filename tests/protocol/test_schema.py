"""The generated code is that of the schema."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import grpc_tools
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

from protocol import split_pb2 as pb

PROTO = Path(pb.__file__).with_name("split.proto")


def test_the_generated_code_is_that_of_the_schema(tmp_path: Path) -> None:
    out = tmp_path / "split.bin"
    include = resources.files(grpc_tools) / "_proto"
    arguments = ["protoc", f"-I{PROTO.parents[1]}", f"-I{include}", f"--descriptor_set_out={out}", str(PROTO)]
    assert protoc.main(arguments) == 0
    compiled = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]
    for message in compiled.message_type:
        for field in message.field:
            field.ClearField("json_name")  # which generated code leaves out
    generated = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(generated)
    assert generated == compiled


def test_the_stub_names_every_message() -> None:
    stub = PROTO.with_name("split_pb2.pyi").read_text()
    assert not [name for name in pb.DESCRIPTOR.message_types_by_name if f"class {name}(" not in stub]


def test_the_service_is_the_one_that_grpc_serves() -> None:
    from protocol.transport.grpc import METHOD, SERVICE

    service = pb.DESCRIPTOR.services_by_name["Split"]
    assert service.full_name == SERVICE
    method = service.methods_by_name[METHOD]
    assert method.client_streaming
    assert method.server_streaming
