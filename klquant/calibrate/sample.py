"""Calibration text sampled from the model itself, for users with no data: tokens drawn from its own distribution."""

import torch
from torch import Tensor

from klquant.calibrate.text import start_tokens
from klquant.calibrate.tokenizer import Tokenizer
from klquant.calibrate.walk import WalkSettings
from klquant.checkpoint.reader import CheckpointReader
from klquant.core.memory import free_memory
from klquant.core.units import decimal
from klquant.errors import UserError
from klquant.model.forward import Model

TEMPERATURE = 1.0


@torch.no_grad()
def sample_windows(
    reader: CheckpointReader, tokenizer: Tokenizer, sequences: int, length: int, seed: int, settings: WalkSettings
) -> Tensor:
    """int64 [sequences, length], each from its own start. The whole model is held in memory for it.

    Raises UserError, with figures, when it does not fit.
    """
    need = sum(i.nbytes for i in reader.tensors.values()) * settings.dtype.itemsize // 2
    free = free_memory(settings.device)
    if need > 0.8 * free:
        raise UserError(
            f"calibration on the model's own text needs the whole model in memory: {decimal(need)}, "
            f"{decimal(free)} are free; give text with --calib, or use --calib tiny"
        )
    model = Model.load(reader, settings.dtype, settings.device)
    generator = torch.Generator().manual_seed(seed)
    starts = start_tokens(tokenizer, sequences, seed)
    shortest = min(len(s) for s in starts)
    ids = torch.tensor([s[:shortest] for s in starts], device=settings.device)
    state, fresh = model.new_state(sequences), ids
    while ids.shape[1] < length:
        logits = model.logits(fresh, state)[:, -1].float().cpu() / TEMPERATURE
        fresh = torch.multinomial(logits.softmax(-1), 1, generator=generator).to(settings.device)
        # A start may be longer than the shortest: its own tokens come before what is sampled.
        for row, start in enumerate(starts):
            if len(start) > ids.shape[1]:
                fresh[row] = start[ids.shape[1]]
        ids = torch.cat((ids, fresh), dim=1)
    return ids.cpu()
