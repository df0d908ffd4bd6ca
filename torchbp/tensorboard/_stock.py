"""The messages of TensorBoard's HParams and Custom Scalars.

Made by hand: what these plugins offer for it imports a TensorFlow stub (0.14 s), or TensorFlow.
"""

# pyright: reportAttributeAccessIssue=false
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from torchbp.tensorboard._proto import DT_FLOAT, SummaryMetadata, TensorProto, TensorShapeProto

__all__ = ["HPARAMS_TAG", "LAYOUT_TAG", "NOTHING", "layout", "layout_metadata", "session"]

HPARAMS_TAG = "_hparams_/session_start_info"
LAYOUT_TAG = "custom_scalars__config__"
NOTHING = TensorProto(
    dtype=DT_FLOAT, tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)])
)


def session(values: Mapping[str, bool | float | str]) -> Any:
    """Return the metadata that is a run's hyperparameters. HParams takes them for its own run.

    No experiment is declared: TensorBoard finds the columns by looking at all runs, whoever wrote
    them.
    """
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in values.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    content = plugin_data_pb2.HParamsPluginData(session_start_info=start).SerializeToString()
    return _metadata("hparams", content)


def layout(categories: Mapping[str, Mapping[str, Sequence[str]]]) -> bytes:
    """Return the layout as Custom Scalars reads it."""
    message = layout_pb2.Layout()
    for heading, charts in categories.items():
        category = message.category.add(title=heading)
        for title, tags in charts.items():
            category.chart.add(title=title).multiline.tag.extend(tags)
    return message.SerializeToString()


def layout_metadata() -> Any:
    """Return the metadata of the layout's tag."""
    return _metadata("custom_scalars", b"")


def _metadata(plugin: str, content: bytes) -> Any:
    data = SummaryMetadata.PluginData(plugin_name=plugin, content=content)
    return SummaryMetadata(plugin_data=data)
