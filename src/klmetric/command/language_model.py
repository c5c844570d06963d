"""A causal language model of Hugging Face's transformers: what it sees of a text, and what it makes of that."""

import warnings
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from klmetric.arithmetic.projection import Projection
from klmetric.saved.errors import InputError

# Tokens that the head is tried on.
TRIED = 64
# How far hidden states times the head may be from the logits, as a part of the largest: both are rounded, logits of
# models in half precision to half precision.
ROUNDING = 1e-4
# In the configurations of models: what their logits are multiplied by, or divided by. The names do not tell which.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def loaded(name: str, revision: str | None) -> tuple[Any, Any]:
    """The tokenizer and the configuration of a model, by its folder or its name.

    Raises:
        InputError: if transformers cannot load them.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        return tokenizer, AutoConfig.from_pretrained(name, revision=revision).get_text_config()
    except Exception as error:  # of any kind: it may be the folder, the network, or code of the model's own
        raise _cannot_be_loaded(name, error) from error


def loaded_model(name: str, revision: str | None, dtype: torch.dtype | None, device: torch.device) -> Any:
    """The model, to be asked only.

    Args:
        name: of it, or its folder.
        revision: of what is published under that name.
        dtype: to compute in; None for that of the weights as they are saved.
        device: to compute on.

    Raises:
        InputError: if transformers cannot load it.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype or "auto")
        # Some that are quantised load themselves on a device, and refuse to be moved.
        return (model if model.device == device else model.to(device)).eval()
    except Exception as error:
        raise _cannot_be_loaded(name, error) from error


def _cannot_be_loaded(name: str, error: Exception) -> InputError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return InputError(
        f"MODEL must be a causal language model with a tokenizer, by its folder or its name. Got {name}, which"
        f" transformers cannot load: {reason}"
    )


def fingerprint(model: Any) -> str:
    """Of all weights."""
    digest = sha256()
    for name, x in model.state_dict().items():
        if isinstance(x, Tensor):
            digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            numbers: Any = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(numbers)
    return digest.hexdigest()


def fingerprint_of_tokenizer(tokenizer: Any) -> str:
    """Of its vocabulary."""
    return sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def windows_of(tokenizer: Any, text: str, window: int) -> tuple[Tensor, int]:
    """The tokens of a text in windows, shape (windows, window), and how many at its end fill none.

    Where the tokenizer begins a text with a token for that, each window begins with it: models of this kind predict
    badly without.
    """
    begin = [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int32)
    step = window - len(begin)
    windows, rest = len(tokens) // step, len(tokens) % step
    whole = tokens[: windows * step].reshape(windows, step)
    return torch.cat([torch.tensor(begin, dtype=torch.int32).expand(windows, -1), whole], 1), rest


def quantize_int8(model: Any) -> Any:
    """The model with the weights of its linear layers in int8, and what they are multiplied by rounded as it comes.

    As is usual, the head stays as it is.
    """
    head = model.get_output_embeddings()
    names = {name for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head}
    if not names:
        raise InputError("--quantize int8 is for linear layers. Got a model that has none but its head.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is about to move
        quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic
        return quantize_dynamic(model, names, dtype=torch.qint8, inplace=True)


def hidden_states(model: Any, tokens: Tensor) -> Any:
    """What the head is given, shape (windows, window, width); None where the model does not say."""
    # What `model.base_model` returns is after the last norm.
    return getattr(model.base_model(tokens.to(model.device, torch.int64), use_cache=False), "last_hidden_state", None)


def logits(model: Any, tokens: Tensor) -> Tensor:
    """What the model makes of tokens, shape (windows, window, classes)."""
    x: Tensor = model(tokens.to(model.device, torch.int64), use_cache=False).logits
    return x


def head_of(model: Any, tokens: Tensor) -> Projection | None:
    """What makes the model's logits of its hidden states, if a linear head does: it is tried on some tokens."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None
    tokens = tokens[:1, :TRIED]
    hidden = hidden_states(model, tokens)
    if hidden is None or hidden.shape[-1] != layer.in_features:
        return None
    wanted = logits(model, tokens).float().cpu()
    bound = max(ROUNDING, 2 * torch.finfo(hidden.dtype).eps) * wanted.abs().max()
    weight, bias = (None if x is None else x.detach().float().cpu() for x in (layer.weight, layer.bias))
    assert weight is not None
    config = model.config.get_text_config()
    for scale in _scales(config):
        head = Projection(weight, bias, scale, getattr(config, "final_logit_softcapping", None))
        if bool(((head(hidden.cpu()) - wanted).abs() <= bound).all()):
            return head
    return None


def _scales(config: Any) -> Iterator[float]:
    yield 1.0
    for name in SCALES:
        if value := getattr(config, name, None):
            yield from (float(value), 1 / float(value))
