"""Which caches a model fits into; known before anything heavy is imported."""

from typing import Literal

from ..model.config import DecoderConfig
from ..model.errors import ModelError
from ..speculate.kernels import PANEL_SLOTS, CacheDtype

WantedDtype = CacheDtype | Literal["auto"]


def fits_bfloat16(config: DecoderConfig) -> bool:
    return config.head_dim % PANEL_SLOTS == 0


def check_cache_dtype(config: DecoderConfig, wanted: WantedDtype) -> None:
    """Raises ModelError where a model's heads do not fit into a cache of this type."""
    if wanted == "bfloat16" and not fits_bfloat16(config):
        raise ModelError(
            f"kv_cache_dtype: bfloat16 wants heads of a multiple of {PANEL_SLOTS} channels, and this "
            f"model's have {config.head_dim}: take float32"
        )
