"""Pretrained Florence-2 weights for the encoder, from a directory or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from meanflow_ros.core.encoder import FlorenceEncoder

FILES = ('model.safetensors', 'tokenizer.json')
_PARTS = ('vision_tower.', 'multi_modal_projector.', 'language_model.encoder.')
_SHARED_EMBEDDING = 'language_model.shared.weight'
_OURS = {'prompt_embed'}


def _directory(source: str) -> Path:
    """Return where the files of `source` are; a name that is no directory is downloaded."""
    path = Path(source)
    if not path.is_dir():
        try:
            path = Path(snapshot_download(source, allow_patterns=list(FILES)))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(f'florence: {source!r} is no directory and cannot be downloaded from '
                             f'the Hugging Face hub: {error}') from None
    for name in FILES:
        if not (path / name).is_file():
            raise ValueError(f'florence: {path} has no {name}')
    return path


def read_tokenizer(source: str) -> Tokenizer:
    """Return Florence-2's tokenizer from a directory or a hub name."""
    return Tokenizer.from_file(str(_directory(source) / 'tokenizer.json'))


def load_florence(encoder: FlorenceEncoder, source: str) -> None:
    """Fill the encoder with the weights of transformers' Florence-2 of the same sizes.

    The text decoder is left out, the prompt embedding stays as it is. ValueError names a weight
    that is missing or has another shape.
    """
    path = _directory(source) / 'model.safetensors'
    stored = {name.removeprefix('model.'): value for name, value in load_file(path).items()}
    weights = {name: value for name, value in stored.items() if name.startswith(_PARTS)}
    embedding = 'language_model.encoder.embed_tokens.weight'
    if embedding not in weights and _SHARED_EMBEDDING in stored:
        weights[embedding] = stored[_SHARED_EMBEDDING]
    own = encoder.state_dict()
    missing = sorted(own.keys() - weights.keys() - _OURS)
    if missing:
        raise ValueError(f'{path} lacks {len(missing)} weights of the encoder, the first is '
                         f'{missing[0]!r}')
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            raise ValueError(f'{path}: {name} has shape {tuple(weights[name].shape)}, the preset '
                             f'has {tuple(own[name].shape)}')
    encoder.load_state_dict({name: weights.get(name, own[name]) for name in own})
