"""The dtype that drafts are computed in."""

import torch

from restpoint.model.layered import LayeredModel


def draft_dtype(layered: LayeredModel) -> torch.dtype:
    """bfloat16 where the processor multiplies in it, which halves the bytes to read; else the model's own dtype.

    Drafts need no more: what is verified is drafted, whatever it was computed in.
    """
    native = layered.device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return torch.bfloat16 if native else layered.dtype
