"""The TorchRec door."""

from __future__ import annotations

from hstu_plugin._versions import check_versions

check_versions(doors=("torchrec",))
