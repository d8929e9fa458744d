"""Which caches a model fits into; known before anything heavy is imported."""

from typing import Literal

from ..model.config import DecoderConfig
from ..model.errors import ModelError
from ..speculate.binding import lib
from ..speculate.kernels import CacheDtype


def check_cache_dtype(config: DecoderConfig, wanted: CacheDtype | Literal["auto"]) -> None:
    """Raises ModelError where a model's heads do not fit into a cache of this type."""
    if wanted == "bfloat16" and config.head_dim % lib.DS_PANEL_SLOTS:
        raise ModelError(
            f"kv_cache_dtype: bfloat16 wants heads of a multiple of {lib.DS_PANEL_SLOTS} channels, and this "
            f"model's have {config.head_dim}: take float32"
        )
