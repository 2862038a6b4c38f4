"""The TorchRec door: KeyedJaggedTensor in, sharded tables, scores in the order of the candidates out."""

from __future__ import annotations

from hstu_plugin._versions import check_versions

check_versions(doors=("torchrec",))

from hstu_plugin.adapters.torchrec.batch import SequenceBatch, check_batch, keyed_jagged  # noqa: E402
from hstu_plugin.adapters.torchrec.ranking import HSTURankingModel, HSTURankingTask  # noqa: E402
from hstu_plugin.adapters.torchrec.retrieval import HSTURetrievalModel, HSTURetrievalTask  # noqa: E402
from hstu_plugin.adapters.torchrec.schema import FeatureSchema, Table  # noqa: E402
from hstu_plugin.adapters.torchrec.sequence import KJTToSequence  # noqa: E402

__all__ = [
    "FeatureSchema",
    "HSTURankingModel",
    "HSTURankingTask",
    "HSTURetrievalModel",
    "HSTURetrievalTask",
    "KJTToSequence",
    "SequenceBatch",
    "Table",
    "check_batch",
    "keyed_jagged",
]
