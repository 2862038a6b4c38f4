"""Encoded histories that grow: which rows a later event leaves alone, and how the others are made anew.

Keys and values of a row stay as they are when an event is appended, unless

- the row is the last one and asks at the time of the event it predicts (``row_time: request``), which was not known (a
  last contextual row takes the others with it, as they see it);
- the row is among the last ``full_attn_tail_len``: the tail moves with the history's end, and a row that it leaves
  behind sees less than before;
- the layer lies behind the truncation: the latest ``truncate_to`` rows are others then, at other places, and see no row
  that was dropped.

Rows of the first two kinds run again from their stored inputs, together with the new events. The layers of the third
kind run again over the rows that enter them, which are few. The result equals encoding the longer history at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_kernels import JaggedLayout, next_event_timestamps
from hstu_plugin.config import HSTUConfig, RowTime
from hstu_plugin.encoder import EncodedHistory, HSTUEncoder, KVCache
from hstu_plugin.kv_cache import Beside, ChannelCache, User
from hstu_plugin.sequence import JaggedSequence


def stable_rows(config: HSTUConfig, length: int, contextual_seq_len: int) -> int:
    """How many leading rows of a history of ``length`` rows keep their keys and values whatever is appended."""
    stable = length
    if config.time_bias and config.row_time is RowTime.REQUEST:
        # Contextual rows see each other: when the last one changes, the others do.
        stable = length - 1 if length > contextual_seq_len else 0
    mask = config.mask
    if mask.max_attn_len and mask.full_attn_tail_len:
        stable = min(stable, max(length - mask.full_attn_tail_len, min(contextual_seq_len, length)))
    return stable


def check_can_append(config: HSTUConfig, contextual_seq_len: int) -> None:
    """Raise ``ValueError`` for a model whose cached rows would all be stale after an append."""
    if config.mask.contextual_sees_history and contextual_seq_len:
        raise ValueError(
            "mask.contextual_sees_history: expected False to append events to a cached history, got True; contextual "
            "rows then see every event and all rows see them, so that nothing of the cache stays valid. Prefill the "
            "longer history instead"
        )


def store_history(encoder: HSTUEncoder, cache: ChannelCache, users: Sequence[User], tokens: JaggedSequence) -> None:
    """Encode histories of encoder inputs ``[L, D]`` and put them into ``cache``, one entry for each of ``users``."""
    encoded = encoder.encode_history(tokens)
    layout = tokens.layout
    ends, lengths = layout.seq_offsets.tolist()[1:], layout.seq_lengths.tolist()
    context = layout.contextual_seq_len
    stable = [stable_rows(encoder.config, n, context) for n in lengths]
    tails = [tokens.values[end - n + s : end] for end, n, s in zip(ends, lengths, stable, strict=True)]
    waists = _split(encoded.waist)
    beside = _beside(encoder, encoded, tails, waists)
    first = encoded.cache[: len(encoder.first_layers)]
    cache.write(users, [0] * len(users), lengths, first, first[0].timestamps, beside)


def append_history(encoder: HSTUEncoder, cache: ChannelCache, users: Sequence[User], new: JaggedSequence) -> None:
    """Let cached histories go on with ``new [R, D]`` encoder inputs, one sequence of them for each of ``users``."""
    config, context = encoder.config, cache.contextual_seq_len
    before = cache.lengths(users)
    counts = new.layout.seq_lengths.tolist()
    after = [n + m for n, m in zip(before, counts, strict=True)]
    stable = [stable_rows(config, n, context) for n in before]
    old = cache.beside(users)
    times = None
    if config.time_bias and new.timestamps is not None:
        old_times = _parts(cache.read_times(users), before)
        times = [torch.cat(pair) for pair in zip(old_times, _parts(new.timestamps, counts), strict=True)]
    added = _parts(new.values, counts)
    rows = torch.cat([part for own, x in zip(old, added, strict=True) for part in (own.tail, x)])
    own_times = None if times is None else torch.cat([t[s:] for t, s in zip(times, stable, strict=True)])
    lengths = torch.tensor([n - s for n, s in zip(after, stable, strict=True)], device=rows.device)
    layout = JaggedLayout.from_lengths(lengths, max_seq_len=max(after, default=0))
    prefix = cache.read(users, stable)
    out, fresh = encoder.extend(JaggedSequence(rows, layout, own_times), prefix)

    inputs = _parts(rows, lengths.tolist())
    later = [stable_rows(config, n, context) for n in after]
    tails = [x[t - s :] for x, s, t in zip(inputs, stable, later, strict=True)]
    encoded = EncodedHistory(out, fresh)
    waists: list[Tensor] = []
    if config.truncates:
        outputs = _parts(out.values, lengths.tolist())
        waists = [
            _waist(config, context, own.waist, n, x, s)
            for own, n, x, s in zip(old, before, outputs, stable, strict=True)
        ]
        waist, asked_at = _waist_sequence(config, context, waists, after, times)
        encoded = EncodedHistory(out, fresh + encoder.finish(waist, asked_at), waist)
    beside = _beside(encoder, encoded, tails, waists)
    cache.write(users, stable, after, fresh, own_times, beside)


def read_history(encoder: HSTUEncoder, cache: ChannelCache, users: Sequence[User]) -> KVCache:
    """What `HSTUEncoder.decode` needs of these users' cached histories."""
    first = cache.read(users)
    if not encoder.config.truncates:
        return first
    times = first[0].timestamps
    if times is not None:
        times = JaggedSequence(times, first[0].layout).keep_recent(encoder.config.truncate_to).values
    return first + cache.read_late(users, times)


def _waist(config: HSTUConfig, context: int, old: Tensor | None, before: int, fresh: Tensor, stable: int) -> Tensor:
    """Rows that enter the later layers: from the old ones as far as they are stable, and from ``fresh`` behind."""
    assert old is not None
    after = stable + fresh.shape[0]
    had = max(context, before - config.truncate_to)
    want = max(context, after - config.truncate_to)
    kept_context = min(context, stable)
    parts = [old[:kept_context], fresh[: max(0, min(context, after) - stable)]]
    if stable > want:
        # Behind the contextual rows, the old rows begin with row `had`.
        offset = min(context, before)
        parts.append(old[offset + want - had : offset + stable - had])
    parts.append(fresh[max(want, stable) - stable :])
    return torch.cat(parts)


def _waist_sequence(
    config: HSTUConfig, context: int, waists: Sequence[Tensor], lengths: Sequence[int], times: Sequence[Tensor] | None
) -> tuple[JaggedSequence, Tensor | None]:
    values = torch.cat(list(waists))
    own = torch.tensor([w.shape[0] for w in waists], device=values.device)
    layout = JaggedLayout.from_lengths(own, max_seq_len=max(lengths, default=0), contextual_seq_len=context)
    if times is None:
        return JaggedSequence(values, layout), None
    joined = torch.cat(list(times))
    whole = JaggedLayout.from_lengths(torch.tensor(lengths, device=values.device), contextual_seq_len=context)
    asked_at = next_event_timestamps(joined, whole)
    kept = JaggedSequence(asked_at, whole, joined).keep_recent(config.truncate_to)
    return JaggedSequence(values, layout, kept.timestamps), kept.values


def _beside(
    encoder: HSTUEncoder, encoded: EncodedHistory, tails: Sequence[Tensor], waists: Sequence[Tensor]
) -> list[Beside]:
    """One for each user. Copies: a view would keep the whole batch alive."""
    if encoded.waist is None:
        return [Beside(tail.clone()) for tail in tails]
    late = encoded.cache[len(encoder.first_layers) :]
    lengths = encoded.waist.layout.seq_lengths.tolist()
    late_k = torch.stack([kv.k for kv in late]).split_with_sizes(lengths, 1)
    late_v = torch.stack([kv.v for kv in late]).split_with_sizes(lengths, 1)
    columns = zip(tails, waists, late_k, late_v, strict=True)
    return [Beside(t.clone(), w.clone(), k.clone(), v.clone()) for t, w, k, v in columns]


def _split(seq: JaggedSequence | None) -> list[Tensor]:
    return [] if seq is None else _parts(seq.values, seq.layout.seq_lengths.tolist())


def _parts(values: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    return list(values.split_with_sizes(list(lengths)))
