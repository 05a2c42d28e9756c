"""The vision-language encoder: cameras, prompts and pictures."""

import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from meanflow_ros.core.encoder import (
    CLIP_MEAN, CLIP_STD, EncoderConfig, FlorenceEncoder, encoder_preset, train_tokenizer)

torch.set_num_threads(1)

TEXTS = ['open the faucet', 'close the drawer', 'press the button']
STRANGE = ['ouvre le robinet !', '打开水龙头', 'öffne den Hahn 🚰👩‍🔬', 'افتح الصنبور',
           'tab\tnew\nline  x', '\x00\x7f', '{instruction} % \\ "']


@pytest.fixture(scope='module')
def tokenizer():
    return train_tokenizer(TEXTS)


@pytest.fixture(scope='module')
def encoder(tokenizer):
    torch.manual_seed(0)
    config = EncoderConfig(
        image_size=64, max_prompt_tokens=77,
        vision={'embed_dim': [16, 24, 32, 40], 'depths': [1, 1, 1, 1], 'num_heads': [2, 2, 4, 4],
                'num_groups': [2, 2, 4, 4], 'patch_stride': [4, 2, 2, 1], 'window_size': 4,
                'drop_path_rate': 0.0, 'projection_dim': 48},
        text={'vocab_size': 512, 'd_model': 48, 'encoder_layers': 2, 'encoder_ffn_dim': 64,
              'encoder_attention_heads': 4, 'max_position_embeddings': 512})
    network = FlorenceEncoder(config, tokenizer)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.eval().requires_grad_(False)


def pictures(batch, cameras, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, cameras, 3, 64, 64, generator=generator) * 255


@pytest.mark.parametrize('cameras', [1, 2, 3, 4])
def test_one_pass_over_all_cameras_equals_separate_passes(encoder, cameras):
    pixels = pictures(2, cameras)
    seen = {}
    hooks = [encoder.vision_tower.register_forward_hook(
                 lambda _, args, result: seen.update(tower=result.last_hidden_state)),
             encoder.language_model['encoder'].register_forward_hook(
                 lambda _, args, kwargs, result: seen.update(kwargs), with_kwargs=True)]
    ids, mask = encoder.tokenize(['open', 'open'])
    context, mask = encoder(pixels, ids, mask)
    for hook in hooks:
        hook.remove()
    tokens = 4 * 4 + 1                     # a grid of 64 / 16 and its mean
    assert context.shape == (2, cameras * tokens + 1 + ids.shape[1], 48) and mask is None
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (CLIP_MEAN, CLIP_STD))
    for b in range(2):
        for c in range(cameras):
            alone = encoder.vision_tower((pixels[b, c][None] - mean) / std).last_hidden_state
            torch.testing.assert_close(seen['tower'][b * cameras + c], alone[0],
                                       rtol=1e-4, atol=1e-5)
            own = seen['inputs_embeds'][b, c * tokens:(c + 1) * tokens]
            torch.testing.assert_close(own, encoder.multi_modal_projector(alone)[0],
                                       rtol=1e-4, atol=1e-5)


def test_each_camera_and_their_order_are_seen(encoder):
    pixels = pictures(1, 2)
    ids, mask = encoder.tokenize(['open'])
    first, _ = encoder(pixels, ids, mask)
    swapped, _ = encoder(pixels.flip(1), ids, mask)
    assert (first - swapped).abs().max() > 1e-2


def test_a_short_prompt_in_a_padded_batch_has_the_context_it_has_alone(encoder):
    prompts = ['open', 'press the button and then close the drawer, please', 'close it']
    pixels = pictures(3, 2)
    ids, mask = encoder.tokenize(prompts)
    assert ids.shape == mask.shape and not mask[0].all() and mask[1].all()
    context, context_mask = encoder(pixels, ids, mask)
    assert context_mask.shape == context.shape[:2]
    for i, prompt in enumerate(prompts):
        own_ids, own_mask = encoder.tokenize([prompt])
        assert own_mask is None
        alone, _ = encoder(pixels[i:i + 1], own_ids, own_mask)
        kept = context[i, context_mask[i]]
        torch.testing.assert_close(kept, alone[0], rtol=1e-4, atol=1e-4)
    unmasked, _ = encoder(pixels, ids, None)
    assert (unmasked[0] - context[0])[context_mask[0]].abs().max() > 1e-3


def test_the_instruction_changes_the_context_of_the_picture(encoder):
    pixels = pictures(1, 1).expand(2, -1, -1, -1, -1)
    context, _ = encoder(pixels, *encoder.tokenize(['open', 'shut']))
    assert (context[0] - context[1])[:17].abs().max() > 1e-3


@pytest.mark.parametrize('text', STRANGE + TEXTS)
def test_any_utf8_text_encodes_and_comes_back(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0 and ids[-1] == 2 and max(ids) < 512
    assert tokenizer.decode(ids) == text


def test_a_tokenizer_survives_its_file(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    again = Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    for text in STRANGE:
        assert again.encode(text).ids == tokenizer.encode(text).ids


def test_a_long_prompt_is_cut(encoder):
    ids, _ = encoder.tokenize(['水' * 1365, 'open'])
    assert ids.shape == (2, 77)
    assert ids[1, -1] == encoder.tokenizer.token_to_id('<pad>') == 1


@pytest.mark.parametrize('shape', [(64, 64), (48, 96), (129, 31), (1, 1), (224, 224)])
def test_a_picture_of_one_colour_keeps_it_at_any_size(encoder, shape):
    picture = np.empty((*shape, 3), np.uint8)
    picture[:] = (201, 17, 93)
    found = encoder.preprocess(picture)
    assert found.shape == (3, 64, 64) and found.dtype == torch.float32
    torch.testing.assert_close(found.mean((1, 2)), torch.tensor([201.0, 17.0, 93.0]))
    assert found.std((1, 2)).max() < 1e-3


def test_a_picture_of_the_right_size_is_not_changed(encoder):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(encoder.preprocess(picture).permute(1, 2, 0).numpy(), picture)


def test_a_picture_twice_the_size_keeps_its_place_and_its_range(encoder):
    picture = np.zeros((128, 128, 3), np.uint8)
    picture[:64, :64] = 255                                        # top left
    found = encoder.preprocess(picture)
    assert found[:, :30, :30].min() > 250 and found[:, 34:, :].max() < 5
    assert found[:, :, 34:].max() < 5 and found.min() >= 0 and found.max() <= 255


def test_what_is_finer_than_a_pixel_is_averaged(encoder):
    picture = np.zeros((256, 256, 3), np.uint8)
    picture[:, ::4] = 255                                          # one bright column in four
    found = encoder.preprocess(picture)[:, :, 4:-4]
    torch.testing.assert_close(found, torch.full_like(found, 255 / 4), rtol=0.05, atol=0)


def test_presets():
    large, tiny = encoder_preset('large'), encoder_preset('tiny', vocab_size=300)
    assert large.vision['embed_dim'] == [256, 512, 1024, 2048]
    assert (large.text['encoder_layers'], large.text['d_model']) == (12, 1024)
    assert tiny.text['vocab_size'] == 300
    with pytest.raises(ValueError, match=r"preset must be one of \['large', 'tiny'\], got 'base'"):
        encoder_preset('base')


@pytest.mark.parametrize('changes, message', [
    ({'image_size': 15}, 'image_size must be 16 to 1024 pixels, got 15'),
    ({'image_size': 1025}, 'image_size'),
    ({'token_dropout': 1.0}, 'token_dropout must be in'),
    ({'token_dropout': -0.1}, 'token_dropout'),
    ({'max_prompt_tokens': 0}, 'max_prompt_tokens must be at least 1, got 0'),
])
def test_a_bad_config_is_refused_by_name(encoder, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(encoder.config, **changes)


def test_a_tokenizer_larger_than_the_embedding_is_refused(encoder, tokenizer):
    size = tokenizer.get_vocab_size()
    config = dataclasses.replace(encoder.config, text={**encoder.config.text,
                                                       'vocab_size': size - 1})
    with pytest.raises(ValueError, match=f'tokenizer has {size} tokens .* only {size - 1}'):
        FlorenceEncoder(config, tokenizer)


def test_a_tokenizer_without_padding_is_refused(encoder):
    with pytest.raises(ValueError, match='the tokenizer has no <pad> token'):
        FlorenceEncoder(encoder.config, Tokenizer(models.BPE()))
