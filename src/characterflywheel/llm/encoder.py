"""The sentence encoder: mean-pooled, unit-length embeddings (the paper uses DRAMA-1B; ours is a setting)."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray


@cache
def shared_encoder(folder: Path, threads: int) -> "Encoder":
    """The process's one encoder of a folder: people and pipeline read with the same eyes, and need it once."""
    return Encoder(folder, threads)


class Encoder:
    """A sentence-transformers folder run by `transformers`: token states averaged, then normalised."""

    def __init__(self, folder: Path, threads: int = 2, batch_size: int = 64, max_tokens: int = 128) -> None:
        from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415 - takes seconds, which a plan can do without
        from transformers.utils import logging  # noqa: PLC0415

        self.threads, self.batch_size, self.max_tokens = threads, batch_size, max_tokens
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings, shape (len(texts), width), rows of length one. Batches are formed by length."""
        torch.set_num_threads(self.threads)
        out = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
            states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
            pooled = (states * mask).sum(1) / mask.sum(1)
            out[rows] = torch.nn.functional.normalize(pooled, dim=1).numpy()
        return out
