"""Settings of a training; the only place with its defaults. A YAML file holds the same names in the same sections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from hstu_plugin.adapters.torchrec.channel import Channel
from hstu_plugin.adapters.torchrec.parquet import OnCorrupt
from hstu_plugin.adapters.torchrec.schema import FeatureSchema
from hstu_plugin.config import HSTUConfig, RetrievalConfig
from hstu_plugin.ranking_config import RankingConfig
from hstu_plugin.schedule import LearningRateSchedule
from hstu_plugin.ultra.load_balance import LoadBalanceConfig
from hstu_plugin.ultra.stochastic_length import StochasticLengthConfig


class TaskName(StrEnum):
    """``RETRIEVAL``: the next item of every position. ``RANKING``: labels of candidates."""

    RETRIEVAL = "retrieval"
    RANKING = "ranking"


class TableOptimizer(StrEnum):
    """Optimisers of the tables, fused into the backward pass by FBGEMM, except ``DENSE_ADAMW``.

    ``AUTO``: rowwise AdamW on CUDA, where it exists, and rowwise Adagrad on CPU. ``ADAMW`` keeps two moments for each
    element; CUDA alone. ``DENSE_ADAMW`` is PyTorch's, on every device: each step moves and decays all rows, also those
    that it did not look up. Every rank then holds all tables, so it is for small ones.
    """

    AUTO = "auto"
    ROWWISE_ADAMW = "rowwise_adamw"
    ADAMW = "adamw"
    DENSE_ADAMW = "dense_adamw"
    ROWWISE_ADAGRAD = "rowwise_adagrad"
    ADAGRAD = "adagrad"
    SGD = "sgd"


class Precision(StrEnum):
    """Of the dense part: float32, or bfloat16 autocast. Tables and losses are float32."""

    FP32 = "fp32"
    BF16 = "bf16"


class NegativePool(StrEnum):
    """What the retrieval loss may draw from. ``SHARED``: one set of ``num_negatives`` items for all rows of a step, for
    tables of any size. ``TABLE``: every step looks all items up, and each row draws for itself, or takes all of them
    (``full_softmax``), as the loss of the other doors does; for tables that fit beside a batch.
    """

    SHARED = "shared"
    TABLE = "table"


class Resume(StrEnum):
    """``AUTO``: go on from the newest usable checkpoint, if any. ``NEVER``: start anew; refuses a used folder.
    ``MUST``: refuse to start without one.
    """

    AUTO = "auto"
    NEVER = "never"
    MUST = "must"


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Attributes:
    train, eval: parquet files: a folder or a glob pattern.
    batch_size: users of one step over *all* ranks.
    data_shards: runs the data is cut into (see `stream`); divides ``batch_size``; 0: the largest divisor up to 64.
        At least the number of ranks; part of the order of the data, so it stays when the number of ranks changes.
    workers: loading processes of each rank; 0 loads in the training process.
    bucket_steps: steps in a window of similar lengths. shuffle: draw a new order each epoch.
    max_history: latest events kept of a history. on_corrupt: files that cannot be read.
    id_dropout: table -> probability with which training of a ranker takes one of its ids for 0, unknown; events of
        history and candidates, and users, each draw for themselves.
    """

    train: str
    eval: str | None = None
    batch_size: int = 128
    data_shards: int = 0
    workers: int = 0
    bucket_steps: int = 16
    shuffle: bool = True
    max_history: int = 200
    on_corrupt: OnCorrupt = OnCorrupt.ERROR
    id_dropout: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least("data.batch_size", self.batch_size, 1)
        _at_least("data.workers", self.workers, 0)
        _at_least("data.data_shards", self.data_shards, 0)
        _at_least("data.max_history", self.max_history, 1)
        object.__setattr__(self, "on_corrupt", OnCorrupt(self.on_corrupt))
        object.__setattr__(self, "id_dropout", dict(self.id_dropout))
        for name, rate in self.id_dropout.items():
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise ValueError(f"data.id_dropout.{name}: expected a probability, got {rate!r}")
        if self.data_shards == 0:
            largest = max(n for n in range(1, min(64, self.batch_size) + 1) if self.batch_size % n == 0)
            object.__setattr__(self, "data_shards", largest)


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """Attributes:
    dense_lr, dense_weight_decay: AdamW of the dense part. clip_norm: of the gradients of all weights that are not in
        fused tables; 0: none.
    dense_betas: of that AdamW. decay_vectors: weights of one dimension (biases, norms, bias tables) decay, too.
    tables: optimiser of the tables. table_lr, table_weight_decay, table_eps, table_betas: its numbers. With
        ``dense_adamw`` they are those of the small tables of actions, too, which else belong to the dense part.
    warmup_steps: both learning rates rise linearly over so many steps. lr_schedule: their course after that, constant,
        or cosine down to 0 at the end of ``run.epochs``.
    """

    dense_lr: float = 1e-3
    dense_weight_decay: float = 0.0
    dense_betas: tuple[float, float] = (0.9, 0.98)
    decay_vectors: bool = False
    clip_norm: float = 1.0
    tables: TableOptimizer = TableOptimizer.AUTO
    table_lr: float = 1e-2
    table_weight_decay: float = 0.0
    table_eps: float = 1e-8
    table_betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 0
    lr_schedule: LearningRateSchedule = LearningRateSchedule.CONSTANT

    def __post_init__(self) -> None:
        object.__setattr__(self, "tables", TableOptimizer(self.tables))
        object.__setattr__(self, "lr_schedule", LearningRateSchedule(self.lr_schedule))
        for name in ("dense_betas", "table_betas"):
            betas = tuple(getattr(self, name))
            object.__setattr__(self, name, betas)
            if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
                raise ValueError(f"optim.{name}: expected two numbers in [0, 1), got {betas}")
        for name in ("dense_lr", "dense_weight_decay", "clip_norm", "table_lr", "table_weight_decay", "table_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"optim.{name}: expected a finite number >= 0, got {value!r} (YAML: write 1.0e-3)")
        if not isinstance(self.decay_vectors, bool):
            raise ValueError(f"optim.decay_vectors: expected true or false, got {self.decay_vectors!r}")
        _at_least("optim.warmup_steps", self.warmup_steps, 0)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Attributes:
    output_dir: checkpoints, TensorBoard files and the result go there; all ranks must see it.
    epochs: passes over the data. max_steps: stop after so many, 0: no bound.
    seed: of weights, order, negatives and dropout. precision: of the dense part.
    messages: precision in which looked-up rows, and their gradients, travel between ranks; ``BF16`` on CUDA alone.
    checkpoint_every: steps between checkpoints, 0: only at the end and on SIGTERM. keep_checkpoints: the newest.
    eval_every: steps between evaluations, 0: only at the end. log_every: steps between log lines.
    resume: whether to go on. timeout_s: a rank that waits longer for the others gives up.
    top_k: cut-offs of retrieval metrics. tensorboard: write event files.
    filter_seen: retrieval never ranks an item of the user's history (the published ML-1M protocol).
    """

    output_dir: str
    epochs: int = 1
    max_steps: int = 0
    seed: int = 0
    precision: Precision = Precision.FP32
    messages: Precision = Precision.FP32
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    eval_every: int = 0
    log_every: int = 50
    resume: Resume = Resume.AUTO
    timeout_s: int = 600
    top_k: tuple[int, ...] = (10, 50, 200)
    tensorboard: bool = True
    filter_seen: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", Precision(self.precision))
        object.__setattr__(self, "messages", Precision(self.messages))
        object.__setattr__(self, "resume", Resume(self.resume))
        object.__setattr__(self, "top_k", tuple(self.top_k))
        for name, low in (("epochs", 1), ("max_steps", 0), ("checkpoint_every", 0), ("keep_checkpoints", 1)):
            _at_least(f"run.{name}", getattr(self, name), low)
        for name, low in (("eval_every", 0), ("log_every", 1), ("timeout_s", 1)):
            _at_least(f"run.{name}", getattr(self, name), low)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """All sections of a training's configuration file.

    Attributes:
        task: what is learned. schema: keys, columns and tables. model: the transducer.
        retrieval, ranking: the head of the task. data, optim, run: see there.
        negative_pool: where the negatives of the retrieval loss come from.
        label_means: of the ranking tasks, in their order; an untrained head then predicts them. Empty: it starts at 0.
        head_users: give the ranker's head the vectors of ``schema.contextual`` beside the encoded candidate.
        mixture: channels of a ranker by name, in place of its one transducer; ``model`` gives what they share.
        sharding: table name -> sharding types that the planner may choose from (``row_wise``, ``table_wise``,
            ``column_wise``, ``data_parallel``, ...); tables not named: any.
        stochastic_length, load_balance: training on parts of long histories, plain or with a budget for each rank.
    """

    task: TaskName
    schema: FeatureSchema
    model: HSTUConfig
    data: DataOptions
    run: RunOptions
    retrieval: RetrievalConfig = field(default_factory=lambda: RetrievalConfig(loss="sampled_softmax"))  # type: ignore[arg-type]
    negative_pool: NegativePool = NegativePool.SHARED
    ranking: RankingConfig | None = None
    label_means: tuple[float, ...] = ()
    head_users: bool = False
    mixture: Mapping[str, Channel] = field(default_factory=dict)
    optim: OptimOptions = field(default_factory=OptimOptions)
    sharding: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stochastic_length: StochasticLengthConfig | None = None
    load_balance: LoadBalanceConfig | None = None

    def __post_init__(self) -> None:
        if self.task is TaskName.RANKING and self.ranking is None:
            raise ValueError("ranking: expected a section with the tasks for task: ranking, got nothing")
        tasks = () if self.ranking is None else self.ranking.tasks
        if self.label_means and len(self.label_means) != len(tasks):
            raise ValueError(f"label_means: expected one for each of {len(tasks)} tasks, got {self.label_means}")
        if self.task is TaskName.RETRIEVAL:
            if self.schema.actions is not None or self.mixture or self.head_users or self.data.id_dropout:
                raise ValueError(
                    "schema.actions, mixture, head_users, data.id_dropout: expected with task: ranking, got "
                    "task: retrieval"
                )
            if self.negative_pool is NegativePool.TABLE and self.schema.negative is None:
                raise ValueError("negative_pool: table brings all items in under schema.negative, got no such key")
        if self.load_balance is not None and self.stochastic_length is None:
            raise ValueError("load_balance: needs a section stochastic_length, got none")
        for section, named in (("sharding", self.sharding), ("data.id_dropout", self.data.id_dropout)):
            unknown = sorted(set(named) - {table.name for table in self.schema.tables})
            if unknown:
                raise ValueError(
                    f"{section}: unknown tables {unknown}; known: {[table.name for table in self.schema.tables]}"
                )
        if self.optim.tables is TableOptimizer.DENSE_ADAMW and self.sharding:
            raise ValueError(
                "sharding: expected nothing with optim.tables: dense_adamw, for which every rank holds all tables, "
                f"got {dict(self.sharding)}; take rowwise_adamw for sharded tables"
            )
        for key in self.schema.id_keys:
            if self.schema.table_of(key).name in self.data.id_dropout and self.schema.lowest_id(key) > 0:
                raise ValueError(
                    f"data.id_dropout: key {key!r} has no id 0 for what is unknown; set schema.unknown_item: true"
                )


def _at_least(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}: expected an int >= {low}, got {value!r}")
