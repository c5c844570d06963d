"""Files of llama.cpp, written from the description of their format."""

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def write_kld(path: Path, logits: Tensor, tokens: np.ndarray, n_ctx: int, window: float = 16.0) -> Tensor:
    """Write logits of (chunks, positions, classes), in float32 as llama.cpp does; returns what the file holds.

    ik_llama.cpp has a window of 24.
    """
    chunks, positions, n_vocab = logits.shape
    assert positions == n_ctx - 1 - n_ctx // 2
    held = torch.empty_like(logits)
    with path.open("wb") as file:
        file.write(b"_logits_" + struct.pack("<iii", n_ctx, n_vocab, chunks))
        file.write(tokens.astype("<i4").tobytes())
        for chunk in range(chunks):
            for position in range(positions):
                row = logits[chunk, position].numpy().astype(np.float32)
                largest = row.max()
                least = max(row.min(), np.float32(largest - np.float32(window)))
                log_sum = np.float32(np.log(np.exp(row - largest).astype(np.float64).sum()))
                minimum, scale = np.float32(least - largest - log_sum), np.float32((largest - least) / 65535)
                codes = np.zeros(n_vocab, np.uint16)
                if scale:
                    codes = np.where(row > least, np.rint((np.maximum(row, least) - least) / scale), 0).astype(
                        np.uint16
                    )
                padded = np.zeros(n_vocab + n_vocab % 2, "<u2")
                padded[:n_vocab] = codes
                file.write(struct.pack("<ff", scale, minimum) + padded.tobytes())
                held[chunk, position] = torch.from_numpy(codes.astype(np.float32) * scale + minimum)
    return held
