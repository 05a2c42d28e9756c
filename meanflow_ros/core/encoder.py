"""The vision-language encoder: Florence-2 (Xiao et al. 2023, arXiv 2311.06242).

Pictures and prompt -> context (B, S, D): the DaViT tower sees all cameras in one pass, its tokens
and the prompt's go through the BART encoder, as in FLOWER. Built from transformers' own classes,
never remote code; the only file that imports transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import BartConfig, Florence2Config
from transformers.models.bart.modeling_bart import BartEncoder
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig
from transformers.models.florence2.modeling_florence2 import (
    Florence2MultiModalProjector, Florence2VisionBackbone)

from meanflow_ros.core.schema import check_keys

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_TOKEN = '<pad>'


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes of a FlorenceEncoder.

    image_size: side of the square that every picture is resized to, pixels. vision and text:
    fields of transformers' Florence2VisionConfig and BartConfig. token_dropout: dropout on the
    context during training.
    """

    image_size: int
    vision: Mapping[str, object]
    text: Mapping[str, object]
    token_dropout: float = 0.1
    max_prompt_tokens: int = 77

    def __post_init__(self):
        if not 16 <= self.image_size <= 1024:
            raise ValueError(f'image_size must be 16 to 1024 pixels, got {self.image_size}')
        if not 0 <= self.token_dropout < 1:
            raise ValueError(f'token_dropout must be in [0, 1), got {self.token_dropout}')
        if self.max_prompt_tokens < 1:
            raise ValueError(f'max_prompt_tokens must be at least 1, '
                             f'got {self.max_prompt_tokens}')
        for name, kind in (('vision', Florence2VisionConfig), ('text', BartConfig)):
            check_keys(getattr(self, name), [], [f.name for f in fields(kind)], name)


def encoder_preset(name: str, vocab_size: int | None = None) -> EncoderConfig:
    """Return the sizes of 'large' (Florence-2-large) or 'tiny' (for CPUs and tests)."""
    if name == 'large':
        return EncoderConfig(
            image_size=224,
            vision={'embed_dim': [256, 512, 1024, 2048], 'depths': [1, 1, 9, 1],
                    'num_heads': [8, 16, 32, 64], 'num_groups': [8, 16, 32, 64],
                    'projection_dim': 1024},
            text={'vocab_size': vocab_size or 51289, 'd_model': 1024, 'encoder_layers': 12,
                  'encoder_attention_heads': 16, 'encoder_ffn_dim': 4096,
                  'max_position_embeddings': 1024})
    if name == 'tiny':
        return EncoderConfig(
            image_size=128, token_dropout=0.0,
            vision={'embed_dim': [48, 96, 192, 256], 'depths': [1, 1, 2, 1],
                    'num_heads': [2, 3, 6, 8], 'num_groups': [2, 3, 6, 8],
                    'patch_stride': [4, 2, 2, 1], 'window_size': 8, 'drop_path_rate': 0.0,
                    'projection_dim': 256},
            text={'vocab_size': vocab_size or 512, 'd_model': 256, 'encoder_layers': 3,
                  'encoder_attention_heads': 8, 'encoder_ffn_dim': 1024,
                  'max_position_embeddings': 512, 'dropout': 0.05, 'attention_dropout': 0.0})
    raise ValueError(f"preset must be one of ['large', 'tiny'], got {name!r}")


def train_tokenizer(texts: Sequence[str], vocab_size: int = 512) -> Tokenizer:
    """Return a byte-level BPE tokenizer fitted to `texts`; it can encode any UTF-8 text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=['<s>', PAD_TOKEN, '</s>'], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 2)])
    return tokenizer


class FlorenceEncoder(nn.Module):
    """Pictures and prompts -> context (B, S, D) and its mask (B, S)."""

    def __init__(self, config: EncoderConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        text = BartConfig(**config.text, decoder_layers=0)
        florence = Florence2Config(vision_config=dict(config.vision), text_config=text.to_dict())
        for part in (florence.vision_config, text):
            part._attn_implementation = 'sdpa'
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.token_to_id(PAD_TOKEN)
        if self.pad_id is None:
            raise ValueError(f'the tokenizer has no {PAD_TOKEN} token')
        if tokenizer.get_vocab_size() > text.vocab_size:
            raise ValueError(f'the tokenizer has {tokenizer.get_vocab_size()} tokens but the '
                             f'encoder embeds only {text.vocab_size}')
        self.width = text.d_model
        self.vision_tower = Florence2VisionBackbone(florence.vision_config)
        self.multi_modal_projector = Florence2MultiModalProjector(florence)
        self.language_model = nn.ModuleDict({'encoder': BartEncoder(text)})
        self.prompt_embed = nn.Parameter(torch.randn(1, 1, self.width) * 0.02)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.register_buffer('mean', torch.tensor(CLIP_MEAN).view(3, 1, 1) * 255, False)
        self.register_buffer('std', torch.tensor(CLIP_STD).view(3, 1, 1) * 255, False)

    def preprocess(self, pictures: np.ndarray | Tensor) -> Tensor:
        """Resize pictures (..., H, W, 3) uint8 on the device -> (..., 3, S, S) float, 0 .. 255."""
        if isinstance(pictures, np.ndarray) and not pictures.flags.writeable:
            pictures = pictures.copy()  # PyTorch has no read-only tensors
        pixels = torch.as_tensor(pictures).to(self.mean.device, non_blocking=True)
        pixels = pixels.movedim(-1, -3).float()
        size = (self.config.image_size, self.config.image_size)
        if pixels.shape[-2:] == size:
            return pixels
        resized = F.interpolate(pixels.reshape(-1, *pixels.shape[-3:]), size, mode='bilinear',
                                antialias=True, align_corners=False)
        return resized.view(*pixels.shape[:-2], *size)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Return token ids (B, L), padded to the longest prompt, and mask (B, L), True = real.

        The mask is None when nothing is padded.
        """
        device, limit = self.mean.device, self.config.max_prompt_tokens
        rows = [self.tokenizer.encode(prompt).ids[:limit] for prompt in prompts]
        length = max(len(row) for row in rows)
        ids = torch.tensor([row + [self.pad_id] * (length - len(row)) for row in rows])
        if all(len(row) == length for row in rows):
            return ids.to(device), None
        mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
        return ids.to(device), mask.to(device)

    def forward(self, pixels: Tensor, ids: Tensor,
                mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Encode pixels (B, C, 3, S, S) in 0 .. 255 and token ids (B, L) with their mask (B, L).

        Returns context (B, C * tokens + 1 + L, D) and its mask (B, same), True = real; or None.
        """
        batch, cameras = pixels.shape[:2]
        pictures = ((pixels - self.mean) / self.std).flatten(0, 1)
        features = self.vision_tower(pictures).last_hidden_state
        visual = self.multi_modal_projector(features)              # (B * C, tokens, D)
        visual = visual.reshape(batch, cameras * visual.shape[1], self.width)
        embed = self.language_model['encoder'].embed_tokens
        sequence = torch.cat([visual, self.prompt_embed.expand(batch, -1, -1).to(visual.dtype),
                              embed(ids).to(visual.dtype)], dim=1)
        attend = None
        if mask is not None:
            mask = F.pad(mask, (sequence.shape[1] - mask.shape[1], 0), value=True)
            attend = mask[:, None, None, :].expand(-1, 1, sequence.shape[1], -1)
        context = self.language_model['encoder'](
            inputs_embeds=sequence, attention_mask=attend).last_hidden_state
        return self.token_dropout(context), mask
