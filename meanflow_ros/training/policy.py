"""The policy that a run trains: sizes from the configuration, statistics from the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from meanflow_ros.core.dit import dit_preset
from meanflow_ros.core.encoder import encoder_preset, train_tokenizer
from meanflow_ros.core.normalize import Normalizer
from meanflow_ros.core.policy import Policy, PolicyConfig
from meanflow_ros.core.schema import to_plain
from meanflow_ros.training.cache import PairDataset
from meanflow_ros.training.config import TrainConfig, options
from meanflow_ros.training.florence import load_florence, read_tokenizer

MOST_INSTRUCTIONS = 200     # that a checkpoint names
SAMPLER_OF = {'rf': 'euler', 'l1': 'regression'}


def make_policy(config: TrainConfig, data: PairDataset) -> Policy:
    """Build a policy with random or pretrained weights and statistics fitted to the data.

    ValueError if `initial` or `florence` cannot be used.
    """
    robot = config.robot
    if config.initial:
        return _continued(config, data.instructions)
    tokenizer = (read_tokenizer(config.florence) if config.florence else train_tokenizer(
        [config.prompt.format(instruction=text) for text in data.instructions]))
    encoder = encoder_preset(config.preset)
    vocabulary = max(encoder.text['vocab_size'], tokenizer.get_vocab_size())
    encoder = dataclasses.replace(encoder, image_size=config.image_size,
                                  text={**encoder.text, 'vocab_size': vocabulary})
    dit = dit_preset(config.preset, {robot.action_space.name: robot.action_space.size},
                     {robot.action_space.name: len(robot.state_names)})
    dit = dataclasses.replace(
        dit, h_in='none' if config.loss in SAMPLER_OF else config.h_in, dropout=config.dropout,
        max_frequency=config.max_frequency, null_context=config.condition_dropout > 0)
    states, actions = data.sample()
    relative = config.data.relative_to(robot) if config.data.relative else ()
    limits = {} if relative else {'lower': robot.action_space.lower,
                                       'upper': robot.action_space.upper}
    policy = Policy.create(PolicyConfig(
        robot=robot, encoder=encoder, dit=dit, prompt=config.prompt,
        state_normalizer=(Normalizer.fit(states, method=config.normalization)
                          if robot.state_names else None),
        action_normalizer=Normalizer.fit(actions, method=config.normalization, **limits),
        sampler=SAMPLER_OF.get(config.loss, 'average'), relative_to=relative,
        max_prefix=config.max_prefix, training=trained_with(config, data.instructions)), tokenizer)
    if config.florence:
        load_florence(policy.network.encoder, config.florence)
    return policy


def trained_with(config: TrainConfig, instructions: Sequence[str]) -> dict:
    """Return what a checkpoint says about its training: every option, as plain values.

    And the `instructions` of its recordings, unless they are more than MOST_INSTRUCTIONS.
    """
    said = {option.name: to_plain(getattr(config, option.name)) for option in options()}
    texts = sorted(set(instructions))
    return said | ({'instructions': texts} if 0 < len(texts) <= MOST_INSTRUCTIONS else {})


def _continued(config: TrainConfig, instructions: Sequence[str]) -> Policy:
    """Load the checkpoint `initial`; its robot, statistics and tokenizer stay as they are."""
    policy = Policy.load(config.initial)
    if to_plain(policy.robot) != to_plain(config.robot):
        raise ValueError(f'{config.initial} was trained for another robot section than this '
                         f'configuration has; copy the robot section of its policy.yaml')
    expected = SAMPLER_OF.get(config.loss, 'average')
    if policy.config.sampler != expected:
        raise ValueError(f'loss {config.loss!r} trains a network for the sampler {expected!r}, '
                         f'but {config.initial} has {policy.config.sampler!r}')
    if config.condition_dropout and not policy.config.dit.null_context:
        raise ValueError(f'condition_dropout needs a network with a null context, '
                         f'{config.initial} has none')
    before = policy.config.training.get('instructions')
    heard = [*before, *instructions] if before else ()     # all of them, or it does not say
    return Policy(dataclasses.replace(policy.config, max_prefix=config.max_prefix,
                                      training=trained_with(config, heard)), policy.network)
