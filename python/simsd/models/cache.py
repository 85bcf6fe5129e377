"""A KV cache with preallocated slots that the caller addresses row by row."""

from __future__ import annotations

import inspect
import math
import mmap

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from simsd.errors import SimsdError
from simsd.models.attention import unchecked
from simsd.models.configuration import head_size
from simsd_kernels import store_kv

# What transformers calls a forward's cache: renamed in 5.24, where the old name warns.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(Qwen3DecoderLayer.forward).parameters else "past_key_values"


class BlockCache(Cache):
    """transformers Cache that keeps K and V of every layer in `capacity` slots.

    `prepare(slots)` says where the next forward's rows go; the forward's `update` calls store them there and return all
    slots as views. The cache knows nothing of what is visible: births and deaths do
    that, and a slot is freed by giving it birth INF. So position_ids, clock, birth and death come with every forward.

    Args:
        config: a Qwen3-style configuration (layers, KV heads, head size).
        batch_size, capacity: sequences and slots for each of them.
        dtype, device: of keys and values; the model's.

    Attributes:
        keys, values: [layers, B, Hkv, capacity, D], zero at first; in memory a head's slots of all sequences lie side
            by side, so that one store can reach them all.
        slots: int32 [B, R], where the forward's rows go; -1 stores nothing.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__(layers=[])
        shape = (config.num_hidden_layers, config.num_key_value_heads, batch_size, capacity, head_size(config))
        self.keys = _zeros(shape, dtype, torch.device(device)).transpose(1, 2)
        self.values = _zeros(shape, dtype, torch.device(device)).transpose(1, 2)
        self.slots: Tensor | None = None
        # One tensor per layer, made once and not in every layer of every forward.
        self._by_sequence = self.keys.unbind(0), self.values.unbind(0)  # each [B, Hkv, capacity, D]
        self._flat = tuple(  # each [1, Hkv, B * capacity, D]
            x.transpose(1, 2).flatten(2, 3).unsqueeze(1).unbind(0) for x in (self.keys, self.values)
        )

    @property
    def batch_size(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def stored(self, packed: bool = False) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys and values of each layer to store to: [B, Hkv, capacity, D] or, packed, [1, Hkv, B * capacity, D]."""
        return self._flat if packed else self._by_sequence

    def prepare(self, slots: Tensor, packed: bool = False) -> None:
        """Sets the slots of the next forward's rows: int32 [B, R]; -1 stores nothing, no slot twice in a sequence.

        With `packed` the forward's rows are [1, N], of any sequences: int32 [1, N], sequence * capacity + slot.
        """
        sequences = 1 if packed else self.batch_size
        if slots.dtype != torch.int32 or slots.dim() != 2 or slots.shape[0] != sequences:
            raise SimsdError(
                f"BlockCache slots must be int32 [{sequences}, rows], got {slots.dtype} {list(slots.shape)}"
            )
        self.slots = slots
        self._stored_keys, self._stored_values = self.stored(packed)
        self._store = unchecked(store_kv, self.keys.device, self.keys.dtype)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Stores [B, Hkv, R, D] (packed: [1, Hkv, N, D]) at `slots`; returns all slots of the layer, [B, Hkv,
        capacity, D]."""
        if self.slots is None:
            raise SimsdError("BlockCache: call prepare(slots) before the forward")
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise SimsdError(
                "BlockCache carries no gradients: run the forward under torch.inference_mode() or no_grad()"
            )
        self._store(key_states, value_states, self._stored_keys[layer_idx], self._stored_values[layer_idx], self.slots)
        return self._by_sequence[0][layer_idx], self._by_sequence[1][layer_idx]

    # What transformers may ask of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.capacity

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.capacity

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    @property
    def is_compileable(self) -> bool:
        return False

    def crop(self, *args, **kwargs) -> None:
        raise SimsdError("BlockCache has no crop: give the slots to forget birth INF in the next forward")


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the CPU in memory that the system gives where it is first touched: there is room for the longest of texts, and
    most are short."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size:,} bytes for keys or values: {error.strerror}") from error
    return torch.frombuffer(memory, dtype=dtype).view(shape)
