"""Models of the command, by name."""

from __future__ import annotations

from dataclasses import replace

from hstu_plugin.adapters.ranking.dataset import TRAIN, RankingData
from hstu_plugin.adapters.ranking.settings import ModelName, RankSettings
from hstu_plugin.ranking_baselines import DLRM, ItemMean, PooledAttention
from hstu_plugin.ranking_config import RankingConfig
from hstu_plugin.ranking_mixture import MixtureModel
from hstu_plugin.ranking_model import RankingModel, WindowRanker


def make_model(settings: RankSettings, data: RankingData) -> WindowRanker:
    """An untrained model that predicts the training labels' means."""
    ranking = RankingConfig(tasks=data.tasks, head_dims=settings.head_dims, head_dropout=settings.head_dropout)
    features, log = data.features, data.log
    train = log.roles == TRAIN
    model: WindowRanker
    if settings.model is ModelName.ITEM_MEAN:
        model = ItemMean(features, ranking)
        model.fit(log.events.items[train, 0], log.labels[train])
        return model
    if settings.model is ModelName.DLRM:
        model = DLRM(features, settings.embedding_dim, ranking)
    elif settings.model is ModelName.POOLED_ATTENTION:
        model = PooledAttention(
            features,
            settings.embedding_dim,
            ranking,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            max_seq_len=settings.max_tokens(num_features=0, num_series=len(features.series)),
            dropout=settings.dropout,
        )
    else:
        features = replace(features, form=settings.token_form, learned_no_action=settings.learned_no_action)
        sizes = {"num_features": len(features.users), "num_series": len(features.series)}
        channels = settings.mixture(**sizes)
        if channels:
            model = MixtureModel(features, channels, ranking)
        else:
            model = RankingModel(features, settings.hstu_config(**sizes), ranking, head_users=settings.head_users)
    model.head.start_from(log.labels[train].nanmean(0))
    return model
