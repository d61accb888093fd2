"""A teacher's most likely tokens as bytes: ids in as many bits as the vocabulary needs, log-probabilities in 16.

At k = 64 a position takes 258 bytes with a vocabulary up to 2^16 and 274 with one up to 2^18.

A log-probability l is stored as the whole number nearest to 65,534 · sqrt(-l / 128), which gives the likely tokens the
finest steps: it comes back within sqrt(128 · |l|) / 65,534 + 1e-8, i.e. 1.7e-4 at l = -1 and 5.5e-4 at l = -10. 65,535
is -inf, and what is below -128 comes back as -128. With T' the distribution that comes back, KL(T || T') is at most
half the mean under T of the squared errors: 1.5e-8 · H, where H nats is the entropy of the k + 1 classes.

N positions, V vocabulary, k tokens kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from distill.errors import InputError
from distill.models.topk import TopK

LOWEST, STEPS, FORBIDDEN = -128.0, 65_534, 65_535
VALUE_BITS = 16


def bytes_per_token(k: int, vocabulary: int) -> int:
    """Count the bytes that a position takes.

    Raises:
        InputError: The vocabulary has fewer than k tokens.
    """
    if not 1 <= k <= vocabulary:
        raise InputError(
            f"teacher.cache.k: cannot keep the {k} most likely tokens of a vocabulary of {vocabulary}; "
            f"write a k from 1 to {vocabulary}, or keep: hidden"
        )
    return _size(k, _id_bits(vocabulary)) + _size(k + 1, VALUE_BITS)


def pack(kept: TopK, vocabulary: int) -> Tensor:
    """Write ids [N, k] and log-probabilities [N, k + 1] as rows of bytes, uint8 [N, bytes_per_token].

    Raises:
        ValueError: An id is outside of the vocabulary, or a log-probability is NaN.
    """
    bytes_per_token(kept.ids.shape[-1], vocabulary)
    if ((kept.ids < 0) | (kept.ids >= vocabulary)).any():
        raise ValueError(f"token ids from {kept.ids.min()} to {kept.ids.max()} in a vocabulary of {vocabulary}")
    values = kept.log_probabilities.double()
    if values.isnan().any():
        raise ValueError("the teacher's log-probabilities are not numbers (NaN)")
    codes = (values.clamp(LOWEST, 0) / LOWEST).sqrt().mul(STEPS).round().long()
    codes = codes.masked_fill(values == -torch.inf, FORBIDDEN)
    return torch.cat([_to_bytes(kept.ids, _id_bits(vocabulary)), _to_bytes(codes, VALUE_BITS)], 1)


def unpack(rows: Tensor, k: int, vocabulary: int) -> TopK:
    """Read what `pack` wrote: ids int64 [N, k] and log-probabilities fp32 [N, k + 1].

    Raises:
        ValueError: The rows, uint8 [N, bytes], are not as long as those of this k and vocabulary.
    """
    bits, length = _id_bits(vocabulary), bytes_per_token(k, vocabulary)
    if rows.dtype != torch.uint8 or rows.shape[1:] != (length,):
        raise ValueError(f"{tuple(rows.shape)} {rows.dtype} are no rows of {length} bytes, k {k} of {vocabulary}")
    start = _size(k, bits)
    numbers = _from_bytes(rows[:, start:], k + 1, VALUE_BITS)
    values = (numbers.double() / STEPS).square().mul(LOWEST).float()
    return TopK(_from_bytes(rows[:, :start], k, bits), values.masked_fill(numbers == FORBIDDEN, -torch.inf))


def _id_bits(vocabulary: int) -> int:
    return max(1, (vocabulary - 1).bit_length())


def _size(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _to_bytes(numbers: Tensor, bits: int) -> Tensor:
    """Write numbers [N, n] in `bits` bits each: all lowest bytes, all second ones, …, then the bits that are left."""
    whole, rest = divmod(bits, 8)
    planes = [(numbers >> 8 * plane & 255).to(torch.uint8) for plane in range(whole)]
    if rest:
        left = (numbers >> 8 * whole).to(torch.uint8)
        flags = (left[..., None] >> _range(rest, numbers.device) & 1).flatten(1)
        flags = functional.pad(flags, (0, -flags.shape[1] % 8))
        flags = flags.reshape(len(flags), flags.shape[1] // 8, 8)
        planes.append((flags << _range(8, numbers.device)).sum(-1, dtype=torch.uint8))
    return torch.cat(planes, 1)


def _from_bytes(data: Tensor, count: int, bits: int) -> Tensor:
    """Read numbers, int64 [N, count], as `_to_bytes` wrote them."""
    whole, rest = divmod(bits, 8)
    numbers = torch.zeros(len(data), count, dtype=torch.int64, device=data.device)
    for plane in range(whole):
        numbers |= data[:, plane * count : (plane + 1) * count].long() << 8 * plane
    if rest:
        flags = (data[:, whole * count :, None] >> _range(8, data.device) & 1).flatten(1)[:, : count * rest]
        flags = flags.reshape(len(flags), count, rest)
        left = (flags << _range(rest, data.device)).sum(-1, dtype=torch.uint8)
        numbers |= left.long() << 8 * whole
    return numbers


def _range(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=device)
