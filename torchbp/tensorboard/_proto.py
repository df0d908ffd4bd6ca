"""The protobuf messages in use. They are made at import, so type checkers can't see them."""

# pyright: reportAttributeAccessIssue=false
from typing import Any

from tensorboard.compat.proto import (
    event_pb2,
    summary_pb2,
    tensor_pb2,
    tensor_shape_pb2,
    types_pb2,
)

Event: Any = event_pb2.Event
SessionLog: Any = event_pb2.SessionLog
Summary: Any = summary_pb2.Summary
SummaryMetadata: Any = summary_pb2.SummaryMetadata
TensorProto: Any = tensor_pb2.TensorProto
TensorShapeProto: Any = tensor_shape_pb2.TensorShapeProto
DATA_CLASS_SCALAR: int = summary_pb2.DATA_CLASS_SCALAR
DATA_CLASS_TENSOR: int = summary_pb2.DATA_CLASS_TENSOR
DT_DOUBLE: int = types_pb2.DT_DOUBLE
DT_FLOAT: int = types_pb2.DT_FLOAT
DT_STRING: int = types_pb2.DT_STRING
