"""What the numbers mean for somebody with a robot, in plain words, with what each rests on."""

from __future__ import annotations

from dataclasses import asdict, dataclass

STOP, LOOK, GOOD = 'stop', 'look', 'good'
HEADLINES = {
    STOP: 'Do not let this policy move the arm yet.',
    LOOK: 'Nothing forbids a careful first try, but look at these points before it.',
    GOOD: 'These recordings show no reason against a careful first try on the robot.'}
OF_THE_RECORDING = ('A check of the replay itself: the recorded commands stood in for a policy, '
                    'so every error must be 0.')
FEW_EPISODES = 5
UNMOVED = 0.02      # of the recorded actions' spread


@dataclass(frozen=True)
class Finding:
    """One observation. rests_on: the number's name in metrics.json."""

    level: str
    text: str
    rests_on: str


def judge(document: dict) -> dict:
    """Return the level, the headline and the findings, the gravest first."""
    if 'executed' not in document or not document['counts']['compared_steps']:
        findings = [Finding(STOP, 'Nothing could be compared with the recordings.', 'recordings')]
    else:
        findings = [finding for look in (_errors, _baselines, _timing, _guard, _inputs, _probes,
                                         _smoothness, _drift, _amount)
                    for finding in look(document)]
    findings += _losses(document)
    order = [STOP, LOOK, GOOD]
    findings.sort(key=lambda finding: order.index(finding.level))
    level = findings[0].level if findings else GOOD
    recorded = document['policy']['kind'] == 'recorded'
    return {'level': level, 'headline': OF_THE_RECORDING if recorded else HEADLINES[level],
            'findings': [asdict(finding) for finding in findings],
            'limits': 'A replay shows what the policy says to recorded inputs. It cannot show '
                      'how the robot would have gone on from there: keep the safety of the '
                      'robot in place.'}


def _errors(document) -> list[Finding]:
    relative = document['relative_error']['value']
    if relative is None:
        return [Finding(LOOK, 'The recorded actions never change: errors have no scale.',
                        'relative_error')]
    span = document['relative_error']
    between = ('' if span['low'] is None else
               f' (95 % interval {span["low"]:.2f} to {span["high"]:.2f})')
    text = (f'The first executed step of a chunk is off by {relative:.2f} times as much as always '
            f'commanding the mean action would be{between}.')
    return [Finding(GOOD if relative < 0.5 else LOOK if relative < 1 else STOP, text,
                    'relative_error')]


def _baselines(document) -> list[Finding]:
    names = {'repeat_last': 'repeating the last action', 'mean_action': 'the mean action',
             'nearest_neighbour': 'looking up the nearest recorded pose'}
    found = []
    for name, words in names.items():
        better = document['baselines'][name].get('policy_better_by')
        if better is None or better['value'] is None:
            continue
        where = f'baselines.{name}.policy_better_by'
        if better['value'] < 0:
            level = STOP if name != 'repeat_last' else LOOK
            found.append(Finding(level, f'It is worse than {words}, by {-better["value"]:.2f}.',
                                 where))
        elif better['low'] is not None and better['low'] <= 0:
            found.append(Finding(LOOK, f'It is better than {words} by {better["value"]:.2f}, '
                                       f'which may be chance.', where))
        else:
            found.append(Finding(GOOD, f'It is better than {words}, by {better["value"]:.2f}.',
                                 where))
    return found


def _timing(document) -> list[Finding]:
    found = []
    misses, latency = document['deadline_misses'], document['latency_ms']
    if misses['share']:
        found.append(Finding(
            STOP if misses['share'] > 0.01 else LOOK,
            f'For {misses["share"]:.1%} of the control steps no action was due: at a latency of '
            f'{latency["p50"]:.0f} ms (p99 {latency["p99"]:.0f} ms) chunks come too late.',
            'deadline_misses.share'))
    elif misses['share'] is not None:
        found.append(Finding(GOOD, f'An action was due at every control step, at a latency of '
                                   f'{latency["p50"]:.0f} ms (p99 {latency["p99"]:.0f} ms).',
                             'deadline_misses.share'))
    return found


def _guard(document) -> list[Finding]:
    guard = document['guard']
    unknown = ''.join(f' Not known from a recording: {kind}.' for kind in guard['not_checked'])
    if not guard['interventions']:
        return [Finding(GOOD, f'The guard let every chunk pass unchanged.{unknown}',
                        'guard.interventions')]
    kinds = ', '.join(f'{kind} {count}' for kind, count in guard['interventions'].items())
    share = guard['rejected_share'] or 0.0
    return [Finding(STOP if share > 0.01 else LOOK,
                    f'The guard intervened: {kinds}; {share:.1%} of the chunks were refused.'
                    f'{unknown}',
                    'guard.interventions')]


def _inputs(document) -> list[Finding]:
    missing = document['missing_input']
    if not missing['causes']:
        return []
    worst = max(missing['causes'], key=lambda what: missing['causes'][what]['seconds'])
    return [Finding(STOP if missing['share'] > 0.2 else LOOK,
                    f'For {missing["seconds"]:.1f} s ({missing["share"]:.1%}) there was no '
                    f'complete observation; mostly {worst}.', 'missing_input.causes')]


def _probes(document) -> list[Finding]:
    moved = {name: probe['moved'] for name, probe in document['probes'].items()
             if isinstance(probe, dict) and probe.get('moved') is not None}
    cameras = {name.removeprefix('blanked '): value for name, value in moved.items()
               if name.startswith('blanked ')}
    blind = [name for name, value in cameras.items() if value < UNMOVED]
    found = []
    if blind:
        found.append(Finding(LOOK, f'It does not look at camera {", ".join(map(repr, blind))}: '
                                   f'in grey, it changes next to nothing.',
                             f'probes."blanked {blind[0]}".moved'))
    elif cameras:
        found.append(Finding(GOOD, 'It looks: every camera, in grey, changes the actions.',
                             'probes'))
    told, where = moved.get('swapped instruction'), 'probes."swapped instruction".moved'
    if told is not None and told < UNMOVED:
        found.append(Finding(LOOK, 'It does not listen: with another instruction, the actions are '
                                   'next to the same.', where))
    elif told is not None:
        found.append(Finding(GOOD, f'It listens: another instruction moves the actions by '
                                   f'{told:.2f} of their spread.', where))
    return found


def _smoothness(document) -> list[Finding]:
    jump = document['seams']['jump_share_of_range']['p99']
    if jump is None:
        return []
    return [Finding(GOOD if jump < 0.01 else LOOK,
                    f'Where one chunk replaces another, commands jump by up to {jump:.1%} of '
                    f'their range (p99).', 'seams.jump_share_of_range')]


def _drift(document) -> list[Finding]:
    found = []
    for group, words in (('states', 'state'), ('actions', 'recorded action')):
        for name, place in document['drift'][group].items():
            if place['outside'] and place['outside'] > 0.1:
                found.append(Finding(LOOK, f'{words} {name!r} is outside of what training has '
                                           f'seen for {place["outside"]:.0%} of the time.',
                                     f'drift.{group}.{name}'))
    for name, picture in document['drift']['pictures'].items():
        if not picture['same']:
            sizes = ', '.join(f'{width}x{height}' for width, height in picture['recorded'])
            found.append(Finding(LOOK, f'camera {name!r} was recorded at {sizes}, training saw '
                                       f'{picture["trained"][0]}x{picture["trained"][1]}.',
                                 f'drift.pictures.{name}'))
    unheard = document['drift']['instructions'].get('unheard')
    if unheard:
        found.append(Finding(LOOK, f'Training has never heard {", ".join(map(repr, unheard[:3]))}'
                                   f'{" and others" if len(unheard) > 3 else ""}.',
                             'drift.instructions.unheard'))
    return found


def _amount(document) -> list[Finding]:
    count = document['counts']['episodes']
    return [] if count >= FEW_EPISODES else [
        Finding(LOOK, f'There are only {count} episodes: too few to judge by.', 'counts.episodes')]


def _losses(document) -> list[Finding]:
    broken = [each['name'] for each in document['recordings'] if each.get('error')]
    lost = [each['name'] for each in document['recordings'] if each.get('lost')]
    skipped = sum(len(each.get('skipped', ())) for each in document['recordings'])
    found = []
    if broken:
        found.append(Finding(LOOK, f'{len(broken)} of {len(document["recordings"])} recordings '
                                   f'could not be replayed: {", ".join(broken[:3])}.',
                             'recordings'))
    if lost:
        found.append(Finding(LOOK, f'{len(lost)} recordings are damaged; what is readable was '
                                   f'used: {", ".join(lost[:3])}.', 'recordings'))
    if skipped:
        found.append(Finding(LOOK, f'{skipped} episodes were left out, see recordings.',
                             'recordings'))
    return found
