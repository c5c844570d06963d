"""Small language models in folders, as transformers saves them, and a text that Python ships. Nothing is downloaded."""

import warnings
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="klmetric record needs transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

transformers.utils.logging.disable_progress_bar()

CLASSES, POSITIONS = 384, 64
SIZES = {
    "vocab_size": CLASSES,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


@lru_cache(1)
def text() -> str:
    return "".join(topics.values())[:60_000]


@lru_cache(2)
def tokenizer(begins: bool = True) -> PreTrainedTokenizerFast:
    """Of bytes that were merged; with a token at the beginning of each text, or without."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CLASSES,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text()], trainer)
    if begins:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def save(folder: Path, model: nn.Module, begins: bool = True) -> Path:
    model.save_pretrained(folder)
    tokenizer(begins).save_pretrained(folder)
    return folder


def untrained(config: Any, seed: int = 0) -> nn.Module:
    """A model of any kind, with weights so large that it is sure of what it says."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for x in {*model.parameters()}:
            if x.ndim > 1:
                x.mul_(8)
            else:
                x.add_(0.3 * torch.randn_like(x))
    return model.eval()


@lru_cache(1)
def trained() -> nn.Module:
    """A Llama of two layers that has read the text for some seconds."""
    ids = torch.tensor(tokenizer()(text(), add_special_tokens=False).input_ids)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sooner, for models as small as this
    for _ in range(120):
        begins = torch.randint(len(ids) - POSITIONS, (16,))
        batch = torch.stack([ids[i : i + POSITIONS] for i in begins.tolist()])
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model.eval()


@torch.inference_mode()
def logits(folder: Path, tokens: Tensor, dtype: torch.dtype = torch.float32, is_int8: bool = False) -> Tensor:
    """What the model in a folder predicts after each token but the last, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if is_int8:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layers = [name for name, x in model.named_modules() if isinstance(x, nn.Linear) and name != "lm_head"]
            torch.ao.quantization.quantize_dynamic(model, {*layers}, torch.qint8, inplace=True)
    return torch.cat([model(some.long()).logits[:, :-1] for some in tokens.split(8)])
