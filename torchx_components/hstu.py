"""One function for each job: ``torchx run -s <scheduler> hstu.<function> --config config.yaml``.

Paths are those of the machine that runs the job; ``local_cwd`` runs it in the folder it is started from. What follows
``--`` goes to the job unchanged. TorchX reads this file's source: annotations must be ``Optional[...]`` and the like,
and every function here is a component.
"""

from typing import Dict, List, Optional

from torchx import specs

from hstu_plugin.adapters.torchx.jobs import Place, distributed_job, quantize_command, single_job


def train(
    *script_args: str,
    config: str,
    j: str = "1x1",
    image: str = "hstu-plugin:latest",
    name: str = "hstu-train",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Train with sharded tables; goes on from the newest checkpoint where there is one.

    Args:
        script_args: of the module, for example --set run.max_steps=100
        config: YAML file of the training
        j: processes, as [<min hosts>:]<hosts>x<processes a host>
        image: container image with hstu-plugin, for schedulers that use one
        name: of the job
        h: named resource, takes precedence over cpu, gpu and memMB
        cpu: CPUs of a replica
        gpu: GPUs of a replica
        memMB: memory of a replica in MB
        env: variables, as A=1,B=2
        mounts: as type=bind,src=/host,dst=/job[,readonly]
        max_retries: how often the scheduler starts it again; each goes on where the last one stopped
        rdzv_port: of the first host, for several hosts
    """
    place = Place(
        image=image, name=name, h=h, cpu=cpu, gpu=gpu, memMB=memMB, env=env, mounts=mounts, max_retries=max_retries
    )
    arguments = ("--config", config, *script_args)
    return distributed_job("hstu_plugin.adapters.torchrec.train", arguments, place, j=j, rdzv_port=rdzv_port)


def evaluate(
    *script_args: str,
    config: str,
    j: str = "1x1",
    image: str = "hstu-plugin:latest",
    name: str = "hstu-evaluate",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Evaluate the newest checkpoint of a training; the metrics do not depend on the number of processes.

    Args:
        script_args: of the module
        config: YAML file of the training
        j: processes, as [<min hosts>:]<hosts>x<processes a host>
        image: container image with hstu-plugin, for schedulers that use one
        name: of the job
        h: named resource, takes precedence over cpu, gpu and memMB
        cpu: CPUs of a replica
        gpu: GPUs of a replica
        memMB: memory of a replica in MB
        env: variables, as A=1,B=2
        mounts: as type=bind,src=/host,dst=/job[,readonly]
        max_retries: how often the scheduler starts it again
        rdzv_port: of the first host, for several hosts
    """
    place = Place(
        image=image, name=name, h=h, cpu=cpu, gpu=gpu, memMB=memMB, env=env, mounts=mounts, max_retries=max_retries
    )
    arguments = ("--config", config, "--evaluate-only", *script_args)
    return distributed_job("hstu_plugin.adapters.torchrec.train", arguments, place, j=j, rdzv_port=rdzv_port)


def recbole(
    *script_args: str,
    config: str,
    image: str = "hstu-plugin:latest",
    name: str = "hstu-recbole",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Train and evaluate a RecBole model on one process: ``hstu-recbole train``.

    Args:
        script_args: settings of RecBole, as --learning_rate=0.001
        config: RecBole configuration file, or several separated by commas
        image: container image with hstu-plugin, for schedulers that use one
        name: of the job
        h: named resource, takes precedence over cpu, gpu and memMB
        cpu: CPUs of a replica
        gpu: GPUs of a replica
        memMB: memory of a replica in MB
        env: variables, as A=1,B=2
        mounts: as type=bind,src=/host,dst=/job[,readonly]
        max_retries: how often the scheduler starts it again
    """
    place = Place(
        image=image, name=name, h=h, cpu=cpu, gpu=gpu, memMB=memMB, env=env, mounts=mounts, max_retries=max_retries
    )
    files = f"--config_files={' '.join(config.split(','))}"
    return single_job(["hstu-recbole", "train", files, *script_args], place)


def score(
    *script_args: str,
    config: str,
    requests: str,
    output: str,
    micro_batch_size: int = 256,
    image: str = "hstu-plugin:latest",
    name: str = "hstu-score",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Score the candidates of a file of requests with a trained ranker (M-FALCON).

    Args:
        script_args: of the module
        config: YAML file of the training whose newest checkpoint scores
        requests: parquet or JSON lines file with the columns of the schema
        output: parquet or JSON lines file to write
        micro_batch_size: candidates scored at once
        image: container image with hstu-plugin, for schedulers that use one
        name: of the job
        h: named resource, takes precedence over cpu, gpu and memMB
        cpu: CPUs of a replica
        gpu: GPUs of a replica
        memMB: memory of a replica in MB
        env: variables, as A=1,B=2
        mounts: as type=bind,src=/host,dst=/job[,readonly]
        max_retries: how often the scheduler starts it again
    """
    place = Place(
        image=image, name=name, h=h, cpu=cpu, gpu=gpu, memMB=memMB, env=env, mounts=mounts, max_retries=max_retries
    )
    arguments = ["--config", config, "--requests", requests, "--output", output]
    arguments += ["--micro-batch-size", str(micro_batch_size), *script_args]
    return single_job(["python", "-m", "hstu_plugin.adapters.torchrec.score", *arguments], place)


def quantize(
    *script_args: str,
    recipe: Optional[str] = None,
    data: Optional[str] = None,
    image: str = "hstu-plugin:latest",
    name: str = "hstu-quantize",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Quantise the tables of a trained model: ``hstu-quantize``, or of a ranker with recipe and data.

    Args:
        script_args: of the command, first the run; see hstu-quantize --help, hstu-rank quantize --help
        recipe: of a ranker: name or YAML file of its training
        data: of a ranker: directory of its data
        image: container image with hstu-plugin, for schedulers that use one
        name: of the job
        h: named resource, takes precedence over cpu, gpu and memMB
        cpu: CPUs of a replica
        gpu: GPUs of a replica
        memMB: memory of a replica in MB
        env: variables, as A=1,B=2
        mounts: as type=bind,src=/host,dst=/job[,readonly]
        max_retries: how often the scheduler starts it again
    """
    place = Place(
        image=image, name=name, h=h, cpu=cpu, gpu=gpu, memMB=memMB, env=env, mounts=mounts, max_retries=max_retries
    )
    return single_job(quantize_command(recipe, data, script_args), place)


def benchmark(
    *script_args: str,
    output: str,
    j: str = "1x1",
    image: str = "hstu-plugin:latest",
    name: str = "hstu-benchmark",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Measure training throughput and model FLOPs utilisation of the distributed trainer.

    Args:
        script_args: sizes, see python -m hstu_plugin.adapters.torchrec.benchmark --help
        output: JSON file to write
        j: processes, as [<min hosts>:]<hosts>x<processes a host>
        image: container image with hstu-plugin, for schedulers that use one
        name: of the job
        h: named resource, takes precedence over cpu, gpu and memMB
        cpu: CPUs of a replica
        gpu: GPUs of a replica
        memMB: memory of a replica in MB
        env: variables, as A=1,B=2
        mounts: as type=bind,src=/host,dst=/job[,readonly]
        max_retries: how often the scheduler starts it again
        rdzv_port: of the first host, for several hosts
    """
    place = Place(
        image=image, name=name, h=h, cpu=cpu, gpu=gpu, memMB=memMB, env=env, mounts=mounts, max_retries=max_retries
    )
    arguments = ("--output", output, *script_args)
    return distributed_job("hstu_plugin.adapters.torchrec.benchmark", arguments, place, j=j, rdzv_port=rdzv_port)
