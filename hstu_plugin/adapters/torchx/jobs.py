"""AppDefs of this project's jobs.

Helpers live here and not beside the components: TorchX reads every function of a registered module as a component.
"""

from __future__ import annotations

import shlex
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchx import specs
from torchx.components.dist import ddp

# Variables of a training that its processes need to agree on whoever starts them.
_THREADS = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where and how a job runs; TorchX's own terms.

    Attributes:
        image: container image, for schedulers that use one. name: of the job.
        h: a named resource; takes precedence over cpu, gpu and memMB, which are those of one replica.
        env: variables. mounts: as ``type=bind,src=/host,dst=/job``. max_retries: of the scheduler.
    """

    image: str
    name: str
    h: str | None
    cpu: int
    gpu: int
    memMB: int  # noqa: N815  # TorchX's spelling
    env: Mapping[str, str] | None
    mounts: Sequence[str] | None
    max_retries: int


def distributed_job(module: str, arguments: Sequence[str], place: Place, *, j: str, rdzv_port: int) -> specs.AppDef:
    """``python -m module arguments`` on the processes of ``j``, by TorchX's own ``dist.ddp``."""
    app = ddp(
        *arguments,
        m=module,
        image=place.image,
        name=place.name,
        h=place.h,
        cpu=place.cpu,
        gpu=place.gpu,
        memMB=place.memMB,
        j=j,
        env={**_THREADS, **(place.env or {})},
        max_retries=place.max_retries,
        rdzv_port=rdzv_port,
        mounts=list(place.mounts) if place.mounts else None,
    )
    for role in app.roles:
        # `torchrun` is only found in an environment that was activated; the module always is.
        role.args[1] = _path() + role.args[1].replace("torchrun", "python -m torch.distributed.run", 1)
    return app


def single_job(command: Sequence[str], place: Place) -> specs.AppDef:
    """One process that runs ``command``."""
    role = specs.Role(
        name=place.name,
        image=place.image,
        entrypoint="bash",
        args=["-c", _path() + " ".join(_quoted(word) for word in command)],
        env=dict(place.env or {}),
        num_replicas=1,
        max_retries=place.max_retries,
        resource=specs.resource(cpu=place.cpu, gpu=place.gpu, memMB=place.memMB, h=place.h),
        mounts=specs.parse_mounts(list(place.mounts)) if place.mounts else [],
    )
    return specs.AppDef(name=place.name, roles=[role])


def quantize_command(recipe: str | None, data: str | None, arguments: Sequence[str]) -> list[str]:
    """``hstu-rank quantize`` for a ranker, which recipe and data tell; ``hstu-quantize`` for a RecBole model.

    Raises:
        ValueError: one of recipe and data without the other.
    """
    if recipe is None and data is None:
        return ["hstu-quantize", *arguments]
    if recipe is None or data is None:
        raise ValueError(f"recipe, data: expected both for a ranker, or none, got recipe={recipe!r}, data={data!r}")
    return ["hstu-rank", "quantize", recipe, "--data", data, *arguments]


def _path() -> str:
    """Finds ``python`` and our commands where TorchX itself was started from; harmless where the folder is missing."""
    return f"PATH={shlex.quote(sysconfig.get_path('scripts'))}:$$PATH "


def _quoted(word: str) -> str:
    # TorchX substitutes ${...} in arguments: a dollar is written twice.
    return shlex.quote(word).replace("$", "$$")
