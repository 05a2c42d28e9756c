"""Published encoder weights, from a local directory as the hub would give it."""

import pytest
import torch
from transformers import Florence2Config, Florence2ForConditionalGeneration

from meanflow_ros.core.encoder import EncoderConfig, FlorenceEncoder, train_tokenizer
from meanflow_ros.training.florence import load_florence, read_tokenizer

VISION = {'embed_dim': [16, 16, 32, 32], 'depths': [1, 1, 1, 1], 'num_heads': [1, 1, 2, 2],
          'num_groups': [1, 1, 2, 2], 'patch_stride': [4, 2, 2, 1], 'window_size': 2,
          'drop_path_rate': 0.0, 'projection_dim': 32}
TEXT = {'vocab_size': 300, 'd_model': 32, 'encoder_layers': 1, 'encoder_attention_heads': 2,
        'encoder_ffn_dim': 32, 'max_position_embeddings': 128}


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """Return a directory as transformers saves a Florence-2, and the model."""
    torch.manual_seed(3)
    directory = tmp_path_factory.mktemp('florence')
    config = Florence2Config(vision_config=VISION, text_config={
        'model_type': 'bart', **TEXT, 'decoder_layers': 1, 'decoder_attention_heads': 2,
        'decoder_ffn_dim': 32}, image_token_id=299)
    model = Florence2ForConditionalGeneration(config)
    model.save_pretrained(directory)
    train_tokenizer(['pick up the cup'], 300).save(str(directory / 'tokenizer.json'))
    return directory, model


def encoder(published, **text):
    torch.manual_seed(4)
    return FlorenceEncoder(EncoderConfig(image_size=32, vision=VISION, text={**TEXT, **text}),
                           read_tokenizer(str(published[0]))).eval()


def test_the_encoder_takes_the_published_weights_and_says_what_the_published_model_says(published):
    ours, model = encoder(published), published[1].eval().model
    before = ours.prompt_embed.clone()
    load_florence(ours, str(published[0]))
    pixels = torch.rand(2, 1, 3, 32, 32) * 255
    pictures = (pixels[:, 0] - ours.mean) / ours.std
    with torch.no_grad():
        found = ours.vision_tower(pictures).last_hidden_state
        expected = model.vision_tower(pictures).last_hidden_state
        torch.testing.assert_close(found, expected)
        ids = torch.tensor([[5, 17, 42]])
        torch.testing.assert_close(
            ours.language_model['encoder'](ids).last_hidden_state,
            model.language_model.encoder(ids).last_hidden_state)
    assert torch.equal(ours.prompt_embed, before)


def test_weights_of_other_sizes_are_refused_by_name(published):
    with pytest.raises(ValueError, match='has shape .* the preset has'):
        load_florence(encoder(published, encoder_ffn_dim=64), str(published[0]))


def test_a_directory_without_weights_and_an_unknown_name_are_clear_errors(
        published, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='has no model.safetensors'):
        load_florence(encoder(published), str(tmp_path))

    def offline(*arguments, **keywords):
        raise OSError('no network')

    monkeypatch.setattr('meanflow_ros.training.florence.snapshot_download', offline)
    with pytest.raises(ValueError, match="'no/such' is no directory and cannot be downloaded"):
        read_tokenizer('no/such')
