"""The KV cache: which pages hold what (`PrefixCache`), and the tensors themselves (`KVPool`)."""

from sglite.cache.kv_pool import KVPool, LayerSpec
from sglite.cache.prefix_cache import CachedPrefix, PrefixCache

__all__ = ["CachedPrefix", "KVPool", "LayerSpec", "PrefixCache"]
